"""Block-sparse attention: the reference against fp64 masks, the rest against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditopt.kernels.block_sparse_attention import api, cpu, cpu_native, flex, ops, reference

Lists = tuple[Tensor, Tensor]
NO_CUDA = not torch.cuda.is_available()
SHAPES = [  # batch, heads, n_q, n_k, head size, block_q, block_k
    (1, 2, 1, 1, 32, 128, 128),
    (2, 2, 63, 63, 64, 64, 64),
    (2, 3, 100, 100, 64, 128, 128),
    (1, 2, 1000, 1000, 64, 128, 64),
    (2, 2, 300, 777, 72, 64, 128),
    (1, 1, 513, 257, 96, 128, 32),
]


def random_lists(batch: int, heads: int, n_q: int, n_k: int, block_q: int, block_k: int) -> Lists:
    """Random lists with an empty row, a single-block row and a full row where there are enough."""
    rows, width = -(-n_q // block_q), -(-n_k // block_k)
    keep = torch.rand(batch, heads, rows, width) < 0.4
    flat = keep.view(-1, width)
    if len(flat) > 2:
        flat[0] = False
        flat[1] = torch.arange(width) == width - 1
        flat[2] = True
    elif heads > 1:
        flat[0] = False
    counts = keep.sum(-1).int()
    ids = torch.where(keep, torch.arange(width), width).sort(-1).values
    return counts, torch.where(ids < width, ids, 0).int()


def qkv(batch: int, heads: int, n_q: int, n_k: int, d: int, **kwargs: Any) -> tuple[Tensor, ...]:
    """q, k, v as strided views of [B, N, H, D] memory, as attention gets them in a DiT."""
    return tuple(torch.randn(batch, n, heads, d, **kwargs).transpose(1, 2) for n in (n_q, n_k, n_k))


def token_mask(lists: Lists, n_q: int, n_k: int, block_q: int, block_k: int) -> Tensor:
    """The kept pairs [Bl, Hl, N_q, N_k], built entry by entry without the reference's help."""
    counts, ids = lists
    mask = torch.zeros(*counts.shape[:2], n_q, n_k, dtype=torch.bool)
    for b in range(counts.shape[0]):
        for h in range(counts.shape[1]):
            for i, count in enumerate(counts[b, h].tolist()):
                for block in ids[b, h, i, :count].tolist():
                    rows = slice(i * block_q, (i + 1) * block_q)
                    mask[b, h, rows, block * block_k : (block + 1) * block_k] = True
    return mask


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Masked dense attention in fp64; rows without keys are zero."""
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v.double()


def relative_error(x: Tensor, truth: Tensor) -> float:
    norm = truth.norm().item()
    return (x.double() - truth).norm().item() / (norm if norm else 1.0)


def error_budget(args: tuple[Any, ...], truth: Tensor) -> float:
    """Twice what the reference itself loses in these inputs' precision, or their unit roundoff."""
    own = relative_error(reference.block_sparse_attention(*args), truth)
    return 2 * max(own, torch.finfo(args[0].dtype).eps)


def fp64_reference(args: tuple[Any, ...]) -> Tensor:
    q, k, v, *rest = args
    return reference.block_sparse_attention(q.double(), k.double(), v.double(), *rest)


def case(shape: tuple[int, ...], list_batch: int = 1, **kwargs: Any) -> tuple[Any, ...]:
    """The operator's arguments for one shape."""
    torch.manual_seed(0)
    batch, heads, n_q, n_k, d, block_q, block_k = shape
    lists = random_lists(list_batch, heads, n_q, n_k, block_q, block_k)
    return (*qkv(batch, heads, n_q, n_k, d, **kwargs), *lists, block_q, block_k, d**-0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_the_masked_oracle(shape: tuple[int, ...]) -> None:
    q, k, v, counts, ids, block_q, block_k, scale = case(shape, dtype=torch.float64)
    mask = token_mask((counts, ids), q.shape[2], k.shape[2], block_q, block_k)
    out, lse = reference.block_sparse_attention_with_lse(
        q, k, v, counts, ids, block_q, block_k, scale
    )
    torch.testing.assert_close(out, oracle(q, k, v, mask, scale))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


def test_reference_gradients_equal_the_oracle() -> None:
    q, k, v, counts, ids, block_q, block_k, scale = case(SHAPES[4], dtype=torch.float64)
    mask = token_mask((counts, ids), q.shape[2], k.shape[2], block_q, block_k)
    mask |= ~mask.any(-1, keepdim=True)  # the oracle's own gradient is NaN on empty rows
    rows = token_mask((counts, ids), q.shape[2], k.shape[2], block_q, block_k).any(-1)[..., None]
    for x in (q, k, v):
        x.requires_grad_()
    upstream = torch.randn_like(q) * rows
    ours = reference.block_sparse_attention(q, k, v, counts, ids, block_q, block_k, scale)
    grads = torch.autograd.grad(ours, (q, k, v), upstream)
    expected = torch.autograd.grad(oracle(q, k, v, mask, scale), (q, k, v), upstream)
    for ours_grad, grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours_grad, grad)


def test_empty_rows_are_zero_with_lse_minus_infinity() -> None:
    args = case((1, 1, 64, 64, 32, 32, 32))
    args[3].zero_()
    out, lse = reference.block_sparse_attention_with_lse(*args)
    assert not out.any()
    assert bool((lse == -math.inf).all())
    assert not ops.call(*args).any()


@pytest.mark.parametrize("list_batch", [1, 2])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] == 2])
def test_lists_broadcast_over_batch_and_heads(shape: tuple[int, ...], list_batch: int) -> None:
    q, k, v, counts, ids, *rest = case(shape, list_batch)
    head = q.shape[1] - 1
    counts, ids = counts[:, head : head + 1], ids[:, head : head + 1]
    expected = reference.block_sparse_attention(
        q, k, v, counts.expand(2, q.shape[1], -1), ids.expand(2, q.shape[1], -1, -1), *rest
    )
    assert torch.equal(reference.block_sparse_attention(q, k, v, counts, ids, *rest), expected)
    torch.testing.assert_close(ops.call(q, k, v, counts, ids, *rest), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_on_cpu_is_within_budget(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = case(shape, dtype=dtype)
    truth = fp64_reference(args)
    assert relative_error(ops.call(*args), truth) <= error_budget(args, truth)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_compiler_the_cpu_gathers(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = case(shape)
    monkeypatch.setattr(cpu_native, "_library", lambda: (None, "no compiler"))
    assert cpu_native.reason_to_decline(args[0]) == "no compiler"
    out = ops.call(*args)
    assert torch.equal(out, cpu.block_sparse_attention(*args, torch.empty_like(out)))
    truth = fp64_reference(args)
    assert relative_error(out, truth) <= error_budget(args, truth)


def test_full_lists_are_dense_attention() -> None:
    args = case(SHAPES[3])
    q, k, v, counts, ids, *_ = args
    counts.fill_(ids.shape[-1])
    ids.copy_(torch.arange(ids.shape[-1]))
    dense = scaled_dot_product_attention(q, k, v)
    truth = scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    assert relative_error(ops.call(*args), truth) <= error_budget(args, truth)
    assert torch.equal(cpu.block_sparse_attention(*args, ops.empty_output(q, v)), dense)
    torch.testing.assert_close(reference.block_sparse_attention(*args), dense)


def test_wrong_ids_and_counts_read_nothing_outside() -> None:
    q, k, v, counts, ids, *rest = case(SHAPES[3])
    expected = ops.call(q, k, v, counts, ids, *rest)
    bad_counts = torch.full_like(counts, 99)
    bad_ids = torch.where(torch.arange(ids.shape[-1]) < counts[..., None], ids, 1 << 24)
    torch.testing.assert_close(
        reference.block_sparse_attention(q, k, v, bad_counts, bad_ids, *rest), expected
    )
    torch.testing.assert_close(ops.call(q, k, v, bad_counts, bad_ids, *rest), expected)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4]])
def test_opcheck(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(torch.ops.ditopt.block_sparse_attention.default, case(shape))


def test_operator_compiles_into_one_graph_on_the_first_call() -> None:
    args = case(SHAPES[2])
    torch._dynamo.reset()
    step = torch.compile(lambda *a: ops.call(*a).transpose(1, 2).flatten(2) * 2, fullgraph=True)
    expected = ops.call(*args).transpose(1, 2).flatten(2) * 2
    torch.testing.assert_close(step(*args), expected)


def flex_graph(block_q: int, block_k: int, scale: float) -> torch.fx.GraphModule:
    """q, k, v, counts, ids -> flex.block_sparse_attention, as a pass writes it."""
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in ("q", "k", "v", "counts", "ids")]
    out = graph.call_function(flex.block_sparse_attention, (*inputs, block_q, block_k, scale))
    graph.output((out,))
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize("shape", [(2, 4, 2048, 2048, 64, 128, 128), (2, 2, 300, 777, 72, 64, 32)])
def test_flex_lowers_through_compile_fx(shape: tuple[int, ...]) -> None:
    from torch._inductor.compile_fx import compile_fx

    args = case(shape)
    inputs = list(args[:5])
    with torch.no_grad():
        compiled = compile_fx(flex_graph(*args[5:]), inputs)
        out = compiled(*inputs)[0]
        truth = fp64_reference(args)
        assert relative_error(out, truth) <= error_budget(args, truth)
        # Another pattern of the same list shape is another input of the same program.
        args[3].clamp_(max=1)
        truth = fp64_reference(args)
        assert relative_error(compiled(*inputs)[0], truth) <= error_budget(args, truth)


def test_flex_lowers_narrow_lists_through_torch_compile() -> None:
    q, k, v, counts, ids, *rest = case((2, 2, 384, 384, 64, 128, 128))
    args = (q, k, v, counts.clamp_(max=2), ids[..., :2].contiguous(), *rest)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(flex_graph(*rest), fullgraph=True)
        truth = fp64_reference(args)
        assert relative_error(compiled(*args[:5])[0], truth) <= error_budget(args, truth)


def test_flex_declines_with_a_reason() -> None:
    q = torch.zeros(1, 1, 128, 64)
    assert flex.reason_to_decline(q, 128, 128) is None
    assert "float64" in str(flex.reason_to_decline(q.double(), 128, 128))
    assert "meta" in str(flex.reason_to_decline(q.to("meta"), 128, 128))


GOOD = {"n_q": 300, "n_k": 777, "block_q": 64, "block_k": 128}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c, i: c.fill_(99), "kv_num_blocks: counts must lie in"),
        (lambda c, i: c.fill_(-1), "kv_num_blocks: counts must lie in"),
        (lambda c, i: (c.fill_(1), i.fill_(7)), r"kv_indices: ids must lie in \[0, 7\)"),
        (lambda c, i: (c.fill_(1), i.fill_(-1)), "kv_indices: ids must lie in"),
        (lambda c, i: (c.fill_(2), i.fill_(0)), "kv_indices: the ids .* strictly ascending"),
    ],
)
def test_validate_lists_names_what_is_wrong(damage: Any, message: str) -> None:
    counts, ids = random_lists(1, 2, **GOOD)
    api.validate_lists(counts, ids, **GOOD)
    damage(counts, ids)
    with pytest.raises(ValueError, match=message):
        api.validate_lists(counts, ids, **GOOD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 2, 300)}, "q: must be"),
        ({"k": torch.zeros(2, 2, 777, 72, dtype=torch.float64)}, "k: must have q's dtype"),
        ({"v": torch.zeros(2, 2, 776, 72)}, "v: must have q's batch"),
        ({"k": torch.zeros(2, 2, 777, 72, device="meta")}, "k: must be on q's device"),
        ({"q": torch.zeros(2, 2, 300, 72, dtype=torch.int8)}, "q: must be float16"),
        ({"kv_num_blocks": torch.zeros(1, 2, 5)}, "kv_num_blocks: must be int32"),
        ({"kv_num_blocks": torch.zeros(1, 2, 4, dtype=torch.int32)}, "kv_indices: its first three"),
        ({"kv_indices": torch.zeros(1, 2, 5, dtype=torch.int32)}, "kv_indices: must have axes"),
        ({"block_k": 256}, "kv_indices: 777 keys .* another length"),
        ({"block_q": 128}, "kv_num_blocks: 300 queries .* another length"),
        ({"block_q": 0}, "block_q: must be positive"),
        ({"scale": math.nan}, "scale: must be finite"),
        ({"impl": "triton"}, "impl: 'triton' needs q on a CUDA device"),
        ({"impl": "best"}, "impl: must be"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    q, k, v, counts, ids, block_q, block_k, _ = case(SHAPES[4])
    good = {"q": q, "k": k, "v": v, "kv_num_blocks": counts, "kv_indices": ids}
    good |= {"block_q": block_q, "block_k": block_k}
    api.block_sparse_attention(**good)
    with pytest.raises(ValueError, match="^" + message):
        api.block_sparse_attention(**(good | change))


def test_gradients_come_from_the_reference_or_are_refused() -> None:
    q, k, v, counts, ids, block_q, block_k, _ = case((1, 1, 64, 64, 32, 32, 32))
    kwargs: dict[str, Any] = {"block_q": block_q, "block_k": block_k}
    q.requires_grad_()
    assert api.block_sparse_attention(q, k, v, counts, ids, **kwargs).requires_grad
    with pytest.raises(ValueError, match="impl: 'cpu' has no backward"):
        api.block_sparse_attention(q, k, v, counts, ids, impl="cpu", **kwargs)


GPU_SHAPES = [
    *SHAPES,
    (1, 2, 1000, 1000, 128, 128, 128),
    (2, 2, 1000, 777, 128, 128, 64),
    (1, 2, 640, 640, 128, 64, 64),
    (1, 3, 333, 777, 128, 64, 64),
    (1, 2, 640, 640, 64, 64, 64),
    (2, 1, 333, 777, 64, 64, 64),
    (1, 2, 777, 1000, 64, 128, 64),
    (1, 2, 1000, 777, 64, 128, 128),
    (1, 2, 640, 640, 128, 128, 128),
    (1, 2, 640, 640, 72, 128, 128),
    (1, 2, 640, 640, 32, 128, 128),
    (1, 2, 300, 300, 80, 128, 128),
    (1, 2, 300, 300, 112, 128, 128),
]


def on_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


def gpu_kernels(args: tuple[Any, ...]) -> list[Any]:
    """Every CUDA kernel that takes this call."""
    from ditopt.kernels.block_sparse_attention import hopper, triton

    declined = hopper.reason_to_decline(args[0], args[5], args[6])
    return [triton] if declined else [triton, hopper]


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_cuda_kernels_are_within_budget(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = on_gpu(case(shape, dtype=dtype))
    truth = fp64_reference(args)
    doubled = (*(x.double() for x in args[:3]), *args[3:])
    _, true_lse = reference.block_sparse_attention_with_lse(*doubled)
    _, own_lse = reference.block_sparse_attention_with_lse(*args)
    for kernel in gpu_kernels(args):
        out, lse = kernel.forward(*args, return_lse=True)
        assert relative_error(out, truth) <= error_budget(args, truth), kernel.__name__
        assert out.stride() == ops.empty_output(args[0], args[2]).stride()
        assert torch.equal(lse.isinf(), true_lse.isinf()), kernel.__name__
        finite = true_lse.isfinite()
        lost = relative_error(own_lse[finite], true_lse[finite])
        budget = 2 * max(lost, torch.finfo(torch.float32).eps * 8)
        assert relative_error(lse[finite], true_lse[finite]) <= budget, kernel.__name__


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
def test_cuda_operator_passes_opcheck_compiles_and_repeats() -> None:
    args = on_gpu(case((2, 2, 1000, 777, 128, 128, 64), 2, dtype=torch.bfloat16))
    torch.library.opcheck(torch.ops.ditopt.block_sparse_attention.default, args)
    torch._dynamo.reset()
    expected = ops.call(*args)
    compiled = torch.compile(lambda *a: ops.call(*a) * 1, fullgraph=True)
    assert torch.equal(compiled(*args), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.call(*args)
    for _ in range(3):
        captured.fill_(math.nan)
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("wrong", [-1, -(1 << 20), 1 << 20, 99])
def test_cuda_kernels_survive_wrong_ids_and_counts(wrong: int) -> None:
    shape = (1, 2, 1000, 1000, 64, 128, 128)
    q, k, v, counts, ids, *rest = on_gpu(case(shape, dtype=torch.float16))
    args = (q, k, v, torch.full_like(counts, 1 << 20), torch.full_like(ids, wrong), *rest)
    for kernel in gpu_kernels(args):
        kernel.forward(*args)
        torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
def test_cuda_kernels_read_any_strides() -> None:
    torch.manual_seed(0)
    lists = tuple(x.cuda() for x in random_lists(1, 2, 300, 300, 128, 128))
    fused = torch.randn(1, 300, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    odd = torch.randn(1, 2, 64, 303, device="cuda", dtype=torch.bfloat16)[..., 3:].transpose(2, 3)
    for tensors in ((q, k, v), (odd, k, odd)):
        args = (*tensors, *lists, 128, 128, 0.125)
        truth = fp64_reference(args)
        for kernel in gpu_kernels(args):
            assert relative_error(kernel.forward(*args)[0], truth) <= error_budget(args, truth)


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
def test_plain_kernel_is_embedded_by_inductor() -> None:
    from torch._inductor.utils import run_and_get_code

    from ditopt.kernels.block_sparse_attention import triton

    args = on_gpu(case((2, 2, 1000, 777, 96, 128, 64), 2, dtype=torch.bfloat16))
    torch.library.opcheck(torch.ops.ditopt.block_sparse_attention_triton.default, args)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: triton.plain(*a) * 1, fullgraph=True)
    out, (code,) = run_and_get_code(compiled, *args)
    torch.testing.assert_close(out, triton.plain(*args), rtol=0, atol=0)
    assert "_forward" in code
    assert "torch.ops.ditopt" not in code


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("block", [64, 128])
def test_flex_lowers_on_cuda(block: int) -> None:
    args = on_gpu(case((2, 2, 1000, 777, 64, block, block), dtype=torch.bfloat16))
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(flex_graph(*args[5:]), fullgraph=True)(*args[:5])[0]
    truth = fp64_reference(args)
    assert relative_error(out, truth) <= error_budget(args, truth)

"""Options of block-sparse attention: reference against dense fp64, the operator against both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditopt.kernels.block_sparse_attention import api, lists, ops_lse, pooling, reference
from ditopt.kernels.block_sparse_attention.lists import Partial, Pooled

OPERATOR = torch.ops.ditopt.block_sparse_attention_with_lse.default
SHAPES = [  # batch, heads, n_q, n_k, head size, block_q, block_k
    (1, 2, 1, 1, 32, 128, 128),
    (2, 2, 63, 63, 16, 64, 64),
    (1, 3, 100, 77, 24, 16, 32),
]
OPTIONS = ["", "p", "l", "b", "m", "w", "plm", "plbw"]
Build = Callable[..., Any]
LOG_ROUNDING = torch.finfo(torch.float32).eps * math.log(16)  # of the float32 bias of 16 tokens


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_dense_attention(
    shape: tuple[int, ...], options: str, build_case: Build
) -> None:
    case = build_case(shape, options)
    out, lse = case.truth()
    ours, our_lse = reference.block_sparse_attention_with_lse(*case.args)
    torch.testing.assert_close(ours, out.value)
    torch.testing.assert_close(our_lse, lse.value)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operator_on_cpu_is_within_the_bound(
    dtype: torch.dtype, options: str, build_case: Build
) -> None:
    case = build_case(SHAPES[2], options, dtype, list_batch=1, list_heads=1 + 2 * ("m" in options))
    truth, true_lse = case.truth()
    out, lse = ops_lse.call(*case.args)
    assert truth.holds(out)
    assert true_lse.holds(lse)


@pytest.mark.parametrize("options", ["", "plbw", "plm"])
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 300, 277, 72, 64, 128), (1, 1, 413, 257, 96, 200, 150), (1, 1, 300, 500, 64, 256, 256)],
)
def test_cpu_kernel_over_block_and_head_sizes(
    shape: tuple[int, ...], options: str, build_case: Build
) -> None:
    case = build_case(shape, options, torch.float32)
    truth, true_lse = case.truth()
    out, lse = ops_lse.call(*case.args)
    assert truth.holds(out)
    assert true_lse.holds(lse)


@pytest.mark.parametrize("wrong", [-1, -(1 << 20), 99, 1 << 27])
def test_wrong_ids_and_counts_read_nothing_outside(wrong: int, build_case: Build) -> None:
    case = build_case((1, 2, 50, 60, 16, 16, 16), "plb", torch.float32)
    case.counts = torch.full_like(case.counts, 1 << 20)
    case.ids = torch.full_like(case.ids, wrong)
    fields = (torch.full_like(x, wrong) for x in case.partial[:3])
    case.partial = Partial(*fields, case.partial.masks)
    first = torch.zeros_like(case.partial.indices)
    for indices in (case.partial.indices, first):  # neither such blocks nor such masks exist
        case.partial = case.partial._replace(indices=indices)
        for attend in (ops_lse.call, reference.block_sparse_attention_with_lse):
            out, lse = attend(*case.args)
            assert not out.any()
            assert bool((lse == -math.inf).all())


def test_ragged_tiles_of_a_grid_are_blocks_with_lengths() -> None:
    grid, tile = (3, 5, 7), (2, 2, 4)
    tokens, size = math.prod(grid), math.prod(tile)
    across = [-(-n // m) for n, m in zip(grid, tile, strict=True)]
    place = torch.empty(tokens, dtype=torch.long)
    lengths = torch.zeros(math.prod(across), dtype=torch.int32)
    for token in range(tokens):  # in raster order, so that each tile fills from its start
        t, h, w = token // 35, token // 7 % 5, token % 7
        block = (t // tile[0] * across[1] + h // tile[1]) * across[2] + w // tile[2]
        place[token] = block * size + lengths[block]
        lengths[block] += 1
    q, k, v = (torch.randn(1, 2, tokens, 16, dtype=torch.float64) for _ in "qkv")
    padded = [torch.full((1, 2, len(lengths) * size, 16), math.nan).double() for _ in "qkv"]
    for x, tiled in zip((q, k, v), padded, strict=True):
        tiled[:, :, place] = x
    padded[0].nan_to_num_(0.0)  # queries of no token are computed, keys never read
    counts = torch.full((1, 1, len(lengths)), len(lengths), dtype=torch.int32)
    ids = torch.arange(len(lengths), dtype=torch.int32).expand(1, 1, len(lengths), -1)
    expected = scaled_dot_product_attention(q, k, v)
    for dtype in (torch.float64, torch.float32):
        args = [x.to(dtype) for x in padded]
        out = api.block_sparse_attention(
            *args, counts, ids, block_q=size, block_k=size, block_lengths=lengths
        )
        torch.testing.assert_close(out[:, :, place], expected.to(dtype))


@pytest.mark.parametrize("options", OPTIONS)
def test_backward_equals_autograd_and_the_dense_formula(options: str, build_case: Build) -> None:
    case = build_case(SHAPES[2], options)
    leaves = [case.q, case.k, case.v, *([case.pooled.k, case.pooled.v] if case.pooled else [])]
    leaves = [x.detach().requires_grad_() for x in leaves]
    case.q, case.k, case.v, *extra = leaves
    if extra:
        case.pooled = case.pooled._replace(k=extra[0], v=extra[1])
    out, lse = ops_lse.call(*case.args)
    grad_out = torch.randn_like(out)
    grad_lse = torch.where(lse.isinf(), 0.0, torch.randn_like(lse))
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    plain = reference.block_sparse_attention_with_lse(*case.args)
    seen = ~lse.isinf()  # logsumexp itself has no gradient at -inf
    loss = (plain[0] * grad_out).sum() + (plain[1] * grad_lse)[seen].sum()
    recorded = torch.autograd.grad(loss, leaves)
    for ours, theirs, truth in zip(
        grads, recorded, case.gradients(grad_out, grad_lse), strict=True
    ):
        torch.testing.assert_close(ours, theirs.nan_to_num(0.0))
        torch.testing.assert_close(ours, truth.value.detach())


@pytest.mark.parametrize("options", ["", "plbw", "m"])
def test_opcheck_with_gradients(options: str, build_case: Build) -> None:
    case = build_case((1, 2, 40, 50, 16, 16, 16), options, torch.float32)
    args = case.args
    for x in args[:3]:
        x.requires_grad_()
    torch.library.opcheck(OPERATOR, (*args[:8], *ops_lse.flatten(*args[8:])))


def test_means_pass_opcheck() -> None:
    x = torch.randn(2, 3, 50, 24, requires_grad=True)
    lengths = torch.tensor([16, 0, 3, 2], dtype=torch.int32)
    torch.library.opcheck(torch.ops.ditopt.block_means.default, (x, 16, lengths))


def test_one_graph_forward_and_backward_on_the_first_call(build_case: Build) -> None:
    case = build_case((1, 2, 64, 64, 16, 32, 32), "", torch.float32)
    q = case.q.requires_grad_()

    def step(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, ids: Tensor) -> Tensor:
        kwargs: dict[str, Any] = {"block_q": 32, "block_k": 32, "dropped": "mean"}
        out, lse = api.block_sparse_attention_with_lse(q, k, v, counts, ids, **kwargs)
        return out.sum() + torch.where(lse.isinf(), 0.0, lse).sum()

    torch._dynamo.reset()
    loss = torch.compile(step, fullgraph=True)(q, *case.args[1:5])
    expected = step(q, *case.args[1:5])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, q)[0] for x in (loss, expected)))


def test_full_lists_are_dense_attention_and_parts_merge(build_case: Build) -> None:
    case = build_case((1, 2, 70, 90, 16, 16, 16))
    width = 6
    ids = torch.arange(width, dtype=torch.int32).expand(1, 1, 5, width)
    counts = torch.full((1, 1, 5), width, dtype=torch.int32)
    args, kwargs = (case.q, case.k, case.v), {"block_q": 16, "block_k": 16}
    dense = scaled_dot_product_attention(*args)
    torch.testing.assert_close(api.block_sparse_attention(*args, counts, ids, **kwargs), dense)
    parts = [
        api.block_sparse_attention_with_lse(*args, counts.fill_(n), lists_ids, **kwargs)
        for n, lists_ids in ((2, ids[..., :2]), (4, ids[..., 2:]))
    ]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    merged = (torch.softmax(lses, 0)[..., None] * outs).sum(0)
    torch.testing.assert_close(merged, dense)


def test_a_negative_scale_is_attention_too(build_case: Build) -> None:
    case = build_case((1, 1, 40, 40, 16, 16, 16))
    case.scale = -0.7
    kwargs: dict[str, Any] = {"block_q": 16, "block_k": 16, "scale": -0.7}
    ours = api.block_sparse_attention(*case.args[:5], **kwargs)
    torch.testing.assert_close(ours, case.truth()[0].value)


# ---- lists


@given(st.data())
def test_bits_survive_packing(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 100))
    bits = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * n, max_size=2 * n)))
    bits = bits.view(2, n)
    packed = lists.pack_bits(bits)
    assert packed.dtype == torch.int32
    assert torch.equal(lists.unpack_bits(packed, n), bits)


@settings(deadline=None)
@given(
    n_q=st.integers(1, 50),
    n_k=st.integers(1, 50),
    blocks=st.tuples(st.sampled_from([1, 5, 16]), st.sampled_from([1, 5, 33])),
    share=st.sampled_from([0.0, 0.1, 0.97, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_token_mask_is_its_lists(
    n_q: int, n_k: int, blocks: tuple[int, int], share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, 2, n_q, n_k, generator=generator) < share
    counts, ids, partial = lists.from_token_mask(mask, *blocks)
    api.validate_lists(counts, ids, n_q, n_k, *blocks, partial)
    rebuilt = torch.zeros_like(mask)
    for h in range(2):
        for i in range(counts.shape[2]):
            rows = slice(i * blocks[0], (i + 1) * blocks[0])
            for j in ids[0, h, i, : counts[0, h, i]].tolist():
                rebuilt[0, h, rows, j * blocks[1] : (j + 1) * blocks[1]] = True
            if partial is None:
                continue
            for entry in range(partial.num_blocks[0, h, i]):
                j = int(partial.indices[0, h, i, entry])
                at = rebuilt[0, h, rows, j * blocks[1] : (j + 1) * blocks[1]]
                bits = lists.unpack_bits(partial.masks[partial.mask_ids[0, h, i, entry]], blocks[1])
                at |= bits[: at.shape[0], : at.shape[1]]
    assert torch.equal(rebuilt, mask)


def test_equal_partial_blocks_share_their_bits() -> None:
    tokens = torch.arange(256)
    band = ((tokens[:, None] - tokens).abs() <= 20)[None, None]
    _, _, partial = lists.from_token_mask(band, 32, 32)
    assert partial is not None
    assert partial.masks.shape[0] == 3  # below, on and above the diagonal


@settings(deadline=None, max_examples=30)
@given(
    before=st.integers(0, 20),
    after=st.integers(0, 20),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    n=st.integers(40, 60),
)
def test_text_is_always_kept(before: int, after: int, blocks: tuple[int, int], n: int) -> None:
    rows, width = (-(-n // block) for block in blocks)
    counts = torch.zeros(1, 1, rows, dtype=torch.int32)
    ids = torch.zeros(1, 1, rows, 1, dtype=torch.int32)
    kept = lists.to_blocks(
        *lists.keep_text(counts, ids, n, n, *blocks, before=before, after=after), width
    )[0, 0]
    text = torch.tensor([t < before or t >= n - after for t in range(n)])
    for i in range(rows):
        for j in range(width):
            is_text = text[i * blocks[0] : (i + 1) * blocks[0]].any()
            is_text |= text[j * blocks[1] : (j + 1) * blocks[1]].any()
            assert bool(kept[i, j]) == bool(is_text)


def test_text_that_does_not_fit_is_refused() -> None:
    counts, ids = torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 1).int()
    with pytest.raises(ValueError, match=r"^after: 20 \+ 20 text tokens do not fit 32"):
        lists.keep_text(counts, ids, 32, 32, 16, 16, before=20, after=20)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_transposed_lists_hold_every_entry_once(rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(1, 2, rows, width, generator=generator) < 0.4
    counts, ids = lists.from_blocks(keep)
    starts, entries = lists.transpose(counts, ids, width)
    for h in range(2):
        for j in range(width):
            own = entries[0, h, starts[0, h, j] : starts[0, h, j + 1]]
            assert (own // width).tolist() == keep[0, h, :, j].nonzero()[:, 0].tolist()
            assert bool((ids[0, h].flatten()[own.long()] == j).all())


# ---- what stands for dropped blocks


def smooth(n: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, 2, n, 16] whose keys and values vary by ``spread`` within blocks of 16."""
    torch.manual_seed(0)
    q = torch.randn(1, 2, n, 16, dtype=torch.float64)
    base = torch.randn(2, 1, 2, n // 16, 1, 16, dtype=torch.float64)
    noise = torch.randn(2, 1, 2, n // 16, 16, 16, dtype=torch.float64)
    k, v = (base + spread * noise).flatten(3, 4)
    return q, k, v


def halves(n: int) -> tuple[Tensor, Tensor]:
    """Lists that keep every other block of 16."""
    blocks = n // 16
    keep = (torch.arange(blocks)[:, None] + torch.arange(blocks)) % 2 == 0
    return lists.from_blocks(keep[None, None])


def errors(spread: float, dropped: api.Dropped, n: int = 128) -> tuple[float, float]:
    """Largest error of the LSE, and relative error of the output, against dense attention."""
    q, k, v = smooth(n, spread)
    dense = scaled_dot_product_attention(q, k, v)
    lse = torch.logsumexp(q @ k.mT / 4, -1)
    out, our_lse = api.block_sparse_attention_with_lse(
        q, k, v, *halves(n), block_q=16, block_k=16, dropped=dropped
    )
    return float((our_lse - lse).abs().max()), float((out - dense).norm() / dense.norm())


def test_means_of_constant_blocks_are_exact() -> None:
    lse_error, error = errors(0.0, "mean")
    assert lse_error <= LOG_ROUNDING
    assert error <= 2 * LOG_ROUNDING
    assert errors(0.0, "drop")[1] > 0.1


def test_means_are_first_order_in_the_mass_and_never_overestimate_it() -> None:
    coarse, fine = (errors(spread, "mean")[0] for spread in (2e-2, 1e-2))
    assert coarse / fine == pytest.approx(4.0, rel=0.1)  # an error of second order, quartered
    q, k, v = smooth(128, 0.5)
    _, lse = api.block_sparse_attention_with_lse(
        q, k, v, *halves(128), block_q=16, block_k=16, dropped="mean"
    )
    assert bool((lse <= torch.logsumexp(q @ k.mT / 4, -1) + LOG_ROUNDING).all())


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_means_beat_dropping(spread: float) -> None:
    assert errors(spread, "mean")[1] < errors(spread, "drop")[1]


def test_nothing_dropped_needs_no_substitute(build_case: Build) -> None:
    case = build_case((1, 1, 40, 40, 16, 16, 16))
    counts = torch.full((1, 1, 3), 3, dtype=torch.int32)
    ids = torch.arange(3, dtype=torch.int32).expand(1, 1, 3, 3)
    args, kwargs = (case.q, case.k, case.v, counts, ids), {"block_q": 16, "block_k": 16}
    ours = api.block_sparse_attention(*args, **kwargs, dropped="mean")
    torch.testing.assert_close(ours, scaled_dot_product_attention(*args[:3]))


def test_means_are_those_of_tokens_that_exist() -> None:
    x = torch.randn(1, 1, 40, 8, dtype=torch.float64)
    lengths = torch.tensor([3, 0, 8], dtype=torch.int32)
    expected = [x[0, 0, :3].mean(0), torch.zeros(8).double(), x[0, 0, 32:40].mean(0)]
    poisoned = x.clone()
    poisoned[0, 0, 3:32] = math.nan
    means = pooling.block_means(poisoned, 16, lengths)[0, 0]
    torch.testing.assert_close(means, torch.stack(expected))
    logs = pooling.log_lengths(40, 16, None, torch.device("cpu"))
    torch.testing.assert_close(logs[0, 0], torch.tensor([16.0, 16.0, 8.0]).log())


def test_weighted_keys_count_as_often_as_their_weight(build_case: Build) -> None:
    case = build_case((1, 1, 20, 16, 16, 16, 16))
    counts, ids = torch.ones(1, 1, 2).int(), torch.zeros(1, 1, 2, 1).int()
    kwargs: dict[str, Any] = {"block_q": 16, "block_k": 16}
    bias = torch.zeros(1, 1, 16)
    bias[..., 3] = math.log(3)
    ours = api.block_sparse_attention(case.q, case.k, case.v, counts, ids, **kwargs, key_bias=bias)
    often = torch.tensor([*range(16), 3, 3])
    expected = scaled_dot_product_attention(case.q, case.k[:, :, often], case.v[:, :, often])
    torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-6)  # the bias is float32


# ---- refusals


def ints(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def pooled_of(**change: Tensor) -> Pooled:
    tokens = torch.zeros(1, 2, 5, 16)
    return Pooled(tokens, tokens, torch.zeros(1, 1, 5), ints(1, 1, 3, 1))._replace(**change)


def partial_of(**change: Tensor) -> Partial:
    good = Partial(ints(1, 1, 3), ints(1, 1, 3, 2), ints(1, 1, 3, 2), ints(4, 16, 1))
    return good._replace(**change)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"block_lengths": torch.zeros(3)}, "block_lengths: must be int32"),
        ({"block_lengths": ints(4)}, "block_lengths: 40 keys .* 3 key blocks, got 4"),
        ({"key_bias": torch.zeros(1, 2, 39)}, r"key_bias: must be \[batch, head, 40\]"),
        ({"key_bias": torch.zeros(1, 2, 40).double()}, "key_bias: must be float32"),
        ({"key_bias": torch.zeros(1, 3, 40)}, "key_bias: its head axis must be 1 or 2"),
        ({"key_bias": torch.zeros(1, 2, 40, requires_grad=True)}, "key_bias: has no gradient"),
        ({"dropped": "sum"}, "dropped: must be drop or mean"),
        ({"dropped": "mean", "key_bias": torch.zeros(1, 2, 40)}, "dropped: the means know no key"),
        ({"dropped": "mean", "pooled": pooled_of()}, "dropped: the means know no pooled"),
        ({"pooled": pooled_of(v=torch.zeros(1, 2, 4, 16))}, r"pooled.v: must be \[1, 2, 5, 16\]"),
        ({"pooled": pooled_of(k=torch.zeros(1, 2, 5, 16).half())}, "pooled.k: must have q's dtype"),
        ({"pooled": pooled_of(bias=torch.zeros(1, 1, 4))}, r"pooled.bias: must be .*5\]"),
        ({"pooled": pooled_of(bits=ints(1, 1, 3, 2))}, "pooled.bits: 3 query blocks and 5"),
        ({"pooled": pooled_of(bits=ints(1, 4, 3, 1))}, "pooled.bits: its head axis"),
        ({"partial": partial_of(indices=ints(1, 1, 2, 2))}, "partial.indices: its first three"),
        (
            {"partial": partial_of(num_blocks=ints(1, 1, 2), indices=ints(1, 1, 2, 2))},
            "partial.num",
        ),
        ({"partial": partial_of(mask_ids=ints(1, 1, 3, 1))}, "partial.mask_ids: must have"),
        ({"partial": partial_of(masks=ints(4, 16, 2))}, "partial.masks: a 16 x 16 block takes"),
        ({"partial": partial_of(masks=torch.zeros(4, 16, 1))}, "partial.masks: must be int32"),
    ],
)
def test_bad_options_are_refused_by_name(option: dict[str, Any], message: str) -> None:
    q, kv = torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 40, 16)
    args = (q, kv, kv, ints(1, 1, 3), ints(1, 1, 3, 2))
    with pytest.raises(ValueError, match="^" + message):
        api.block_sparse_attention(*args, block_q=16, block_k=16, **option)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_ids": ints(1, 1, 3, 2) + 4}, r"partial.mask_ids: must lie in \[0, 4\)"),
        ({"indices": ints(1, 1, 3, 2) + 3}, r"partial.indices: ids must lie in \[0, 3\)"),
        ({"indices": ints(1, 1, 3, 2) + 1}, "partial.indices: a block must not be full and"),
        ({"num_blocks": ints(1, 1, 3) + 3}, "partial.num_blocks: counts must lie in"),
    ],
)
def test_validate_lists_reads_partial_blocks(change: dict[str, Tensor], message: str) -> None:
    full = (torch.ones(1, 1, 3).int(), torch.ones(1, 1, 3, 1).int())
    partial = partial_of(num_blocks=torch.ones(1, 1, 3).int())
    api.validate_lists(*full, 40, 40, 16, 16, partial, ints(3))
    with pytest.raises(ValueError, match="^" + message):
        api.validate_lists(*full, 40, 40, 16, 16, partial._replace(**change))
    with pytest.raises(ValueError, match=r"^block_lengths: must lie in \[0, 16\]"):
        api.validate_lists(*full, 40, 40, 16, 16, None, ints(3) + 17)


def test_an_implementation_that_cannot_is_refused(build_case: Build) -> None:
    case = build_case((1, 1, 40, 40, 16, 16, 16), "", torch.float32)
    kwargs: dict[str, Any] = {"block_q": 16, "block_k": 16, "impl": "cpu"}
    assert torch.equal(
        api.block_sparse_attention(*case.args[:5], **kwargs, dropped="mean"),
        api.block_sparse_attention(*case.args[:5], block_q=16, block_k=16, dropped="mean"),
    )
    case.q.requires_grad_()
    with pytest.raises(ValueError, match=r"^impl: 'cpu' has no backward"):
        api.block_sparse_attention(*case.args[:5], **kwargs)

"""8-bit attention: the reference against exact attention, the kernel against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention import ops_8bit, reference, reference_8bit

from .barriers import keep_their_memory

NO_HOPPER = not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)
SHAPES = [  # heads, n_q, n_k, head size, block_k
    (2, 200, 200, 64, 128),
    (3, 1000, 1000, 128, 128),
    (2, 300, 777, 128, 64),
    (2, 2048, 2048, 64, 64),
]


def case(shape: tuple[int, ...], device: str = "cpu", dtype: Any = torch.float32) -> Any:
    """Arguments of the operator; rows keep about half of the blocks, the first one none."""
    torch.manual_seed(0)
    heads, n_q, n_k, d, block_k = shape
    q, k, v = (
        torch.randn(1, n, heads, d, device=device, dtype=dtype).transpose(1, 2)
        for n in (n_q, n_k, n_k)
    )
    k = k + 3 * torch.randn(1, heads, 1, d, device=device, dtype=dtype)
    rows, width = -(-n_q // 128), -(-n_k // block_k)
    keep = torch.rand(1, heads, rows, width) < 0.5
    keep[0, 0, 0] = False
    ids = torch.where(keep, torch.arange(width), width).sort(-1).values
    lists = keep.sum(-1).int().to(device), torch.where(ids < width, ids, 0).int().to(device)
    return (q, k, v, *lists, 128, block_k, d**-0.5)


def exact(args: Any) -> Tensor:
    q, k, v, *rest = args
    return reference.block_sparse_attention(q.double(), k.double(), v.double(), *rest)


def relative_error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def test_operands_on_the_grid_are_exact() -> None:
    args = list(case((2, 256, 256, 64, 128)))
    half = torch.randint(-127, 128, (1, 2, 128, 64)).float()
    half[..., 0] = 127.0  # every row and every block reaches the last step
    args[0] = torch.cat([half, half.flip(2)], 2) / 256
    args[1] = torch.cat([half, -half], 2) / 1024  # without a mean
    args[3].fill_(2)
    args[4].copy_(torch.arange(2))
    out = reference_8bit.block_sparse_attention_8bit(*args, values=False)
    torch.testing.assert_close(out, exact(args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", [False, True])
def test_a_constant_in_all_keys_changes_nothing(values: bool) -> None:
    args = [
        x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in case(SHAPES[0])
    ]
    shifted = list(args)
    shifted[1] = args[1] + 4.0
    before, after = (
        reference_8bit.block_sparse_attention_8bit(*a, values=values) for a in (args, shifted)
    )
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-3)


def test_rows_without_keys_are_zero() -> None:
    args = case(SHAPES[1])
    out = reference_8bit.block_sparse_attention_8bit(*args, values=True)
    assert not out[0, 0, :128].any()
    assert out[0, 1, :128].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_e4m3_values_stay_within_their_rounding(shape: tuple[int, ...]) -> None:
    args = list(case(shape))
    with_v, without = (
        reference_8bit.block_sparse_attention_8bit(*args, values=v) for v in (True, False)
    )
    # e4m3 rounds by at most 2**-4 of a number: once for P, once for V. Below its normal range the
    # step is 2**-9: of 448 parts of V's largest, and of 256 parts of P's.
    args[2] = args[2].abs()
    size = reference_8bit.block_sparse_attention_8bit(*args, values=False)
    largest = args[2].amax(2, keepdim=True).double()
    below = largest * 2.0**-10 * (1 / 448 + args[1].shape[2] / 256)
    assert ((with_v - without).abs() <= (2 * 2.0**-4 + 2.0**-8) * size + below).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_scores_cost_about_a_hundredth(shape: tuple[int, ...]) -> None:
    args = case(shape)
    out = reference_8bit.block_sparse_attention_8bit(*args, values=False)
    # A step is the largest of a row or block over 127: 3 to 5 standard deviations of normal data,
    # so two roundings of scores with deviation 1 have one of at most sqrt(2 / 12) * 5 / 127.
    assert relative_error(out, exact(args)) < 2 * (2 / 12) ** 0.5 * 5 / 127


def test_e4m3_saturates_and_rounds_to_even() -> None:
    x = torch.tensor([1e4, -1e4, 1.0625, 1.1875, 2.0**-10])
    expected = torch.tensor([448.0, -448.0, 1.0, 1.25, 0.0])
    torch.testing.assert_close(reference_8bit.round_e4m3(x), expected)


@pytest.mark.parametrize("name", ["", "_simulated"])
@pytest.mark.parametrize("values", [False, True])
def test_opcheck(values: bool, name: str) -> None:
    operator = getattr(torch.ops.ditopt, f"block_sparse_attention_8bit{name}").default
    args = (*case(SHAPES[0], dtype=torch.bfloat16), values)
    torch.library.opcheck(operator, args)
    exact = reference_8bit.block_sparse_attention_8bit(*args[:-1], values=values)
    torch.testing.assert_close(operator(*args), exact.bfloat16())


def test_public_function_is_the_reference_on_a_cpu() -> None:
    *tensors, block_q, block_k, scale = args = case(SHAPES[0])
    blocks = {"block_q": block_q, "block_k": block_k}
    for arithmetic, values in (("int8_qk", False), ("int8_qk_e4m3_pv", True)):
        out = ops_8bit.block_sparse_attention_8bit(*tensors, **blocks, arithmetic=arithmetic)
        expected = reference_8bit.block_sparse_attention_8bit(*args, values=values)
        torch.testing.assert_close(out, expected.float())
        assert out.transpose(1, 2).is_contiguous()
    assert scale == 64**-0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arithmetic": "int4"}, "arithmetic: must be int8_qk or int8_qk_e4m3_pv, got 'int4'"),
        ({"scale": -1.0}, "scale: must be finite and positive, got -1.0"),
        ({"block_q": 64}, "kv_num_blocks: 200 queries in blocks of 64 need 4 query blocks"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    *tensors, block_q, block_k, _ = case(SHAPES[0])
    options: dict[str, Any] = {"block_q": block_q, "block_k": block_k, "arithmetic": "int8_qk"}
    with pytest.raises(ValueError, match=message):
        ops_8bit.block_sparse_attention_8bit(*tensors, **{**options, **change})
    tensors[0].requires_grad_()
    with pytest.raises(ValueError, match="q: 8-bit attention has no gradients"):
        ops_8bit.block_sparse_attention_8bit(*tensors, **options)


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_as_close_as_its_reference(
    shape: tuple[int, ...], dtype: torch.dtype, values: bool
) -> None:
    from ditopt.kernels.block_sparse_attention import hopper_8bit

    args = case(shape, "cuda", dtype)
    truth = exact(args)
    own = relative_error(reference_8bit.block_sparse_attention_8bit(*args, values=values), truth)
    out = hopper_8bit.forward(*args, values=values)
    assert relative_error(out, truth) <= 1.1 * own
    assert not out[0, 0, :128].any()
    assert torch.equal(hopper_8bit.forward(*args, values=values), out)
    for (_, _, constants), program in hopper_8bit._launch._programs.items():
        stages, q_stages = constants[4:6]
        keep_their_memory(program.asm["ptx"], 2 * (q_stages + 2 * stages))


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("wrong", [-1, 1 << 20])
def test_kernel_survives_wrong_ids(wrong: int) -> None:
    from ditopt.kernels.block_sparse_attention import hopper_8bit

    args = case(SHAPES[1], "cuda", torch.bfloat16)
    args[4].fill_(wrong)
    out = hopper_8bit.forward(*args, values=True)
    torch.cuda.synchronize()
    assert out.isfinite().all()

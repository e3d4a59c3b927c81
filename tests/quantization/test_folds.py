"""What transforms cost behind a modulated norm: nothing that folding them away would save."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from ditopt.quantization import transforms
from ditopt.quantization.rowwise import quantize_rows

K = 256


def compiled(transform: str) -> dict[str, int]:
    """Kernels, buffers and calls of libraries of norm, modulation, transform and rounding."""
    torch._dynamo.reset()
    x, scale, shift = torch.randn(2, 64, K), torch.randn(2, 1, K), torch.randn(2, 1, K)
    statistics = {"mean": torch.randn(K), "amax": torch.rand(K) + 1}
    *_, operands = transforms.fold(transform, torch.randn(96, K), None, statistics)

    def layer(
        x: Tensor, scale: Tensor, shift: Tensor, operands: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.layer_norm(x, (K,)) * (1 + scale) + shift
        y = transforms.apply(y.reshape(-1, K), transform, operands, K)
        return quantize_rows(y, 127.0, torch.int8)

    _, code = run_and_get_code(torch.compile(layer, dynamic=False), x, scale, shift, operands)
    text = "\n".join(code)
    counted = {
        "kernels": r"^cpp_fused_\w+ = ",
        "buffers": r"= empty_strided_cpu",
        "libraries": r"extern_kernels\.\w+",
    }
    return {name: len(re.findall(what, text, re.M)) for name, what in counted.items()}


def test_subtraction_and_division_are_inside_the_kernel_that_rounds() -> None:
    """So centring and balance folded into shift, modulation or norm weights would save nothing."""
    plain = compiled("none")
    assert plain["kernels"] == 1
    assert plain["libraries"] == 0
    assert compiled("centre") == plain
    assert compiled("balance") == plain


def test_rotation_is_a_product_of_its_own() -> None:
    """The count tells: what does not fuse is another kernel, another buffer and a product."""
    plain, rotated = compiled("none"), compiled("rotate")
    assert rotated["kernels"] > plain["kernels"]
    assert rotated["buffers"] > plain["buffers"]
    assert rotated["libraries"] == 1

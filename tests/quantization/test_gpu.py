"""Formats on a GPU: the device's products give the simulated numbers, in the kernels promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ditopt.quantization.rowwise import FP8_ROW, INT8_ROW, RowFormat

from .small_model import plan_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@torch.no_grad()
@pytest.mark.parametrize("form", [FP8_ROW, INT8_ROW], ids=lambda f: f.name)
@pytest.mark.parametrize(("m", "k", "n"), [(17, 48, 32), (300, 1152, 3456)])
def test_native_products_are_the_simulated_ones(form: RowFormat, m: int, k: int, n: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((m, k), (n, k), (n,))
    )
    made = form.encode(weight.float())
    native, simulated = (
        form.multiply(x, made, bias, torch.bfloat16, native=choice) for choice in (True, False)
    )
    difference = (native.double() - simulated.double()).norm() / simulated.double().norm()
    assert float(difference) < 5e-3  # rounding to bf16, and fp8's fast accumulation


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(1152, 1152), nn.Linear(1152, 1152)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Any:
        y = layer_norm(x, (1152,)) * (1 + scale) + shift
        return self.q(y), self.k(y)


@torch.no_grad()
def test_one_rounding_and_one_product_for_merged_layers() -> None:
    torch._dynamo.reset()
    model = Modulated().cuda().bfloat16().eval()
    x = torch.randn(2, 512, 1152, device="cuda", dtype=torch.bfloat16)
    scale, shift = (torch.randn(2, 1, 1152, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    plan = plan_for(model, {key: {"format": "fp8_row"} for key in "qk"})
    run = torch.compile(model, backend="ditopt", options={"plan": plan})
    run(x, scale, shift)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(x, scale, shift)
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    names = [e.name for e in profile.events() if e.device_type == device]
    # The halves of the merged product are copied out: they are results here.
    kernels = [name for name in names if "Mem" not in name and "fused_copy_split" not in name]
    assert len([name for name in kernels if name.startswith("triton_red")]) == 0, names
    assert len([name for name in kernels if name.startswith("triton_per")]) == 1, names
    assert len([name for name in kernels if not name.startswith("triton")]) == 1, names

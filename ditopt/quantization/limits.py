"""Which layers a device's 8-bit product takes: checked here, since a CPU takes what a GPU refuses.

Rules of torch 2.11 to 2.13: `_scaled_mm` wants K and N in steps of 16 and compute capability 8.9,
`_int_mm` wants K and N in steps of 8 and more than 16 rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

_FP8_CAPABILITY = (8, 9)
_INT8_CAPABILITY = (7, 5)
_INT8_ROWS = 16
_STEP = {"fp8_row": 16, "int8_row": 8}


def missing_hardware(format_name: str | None, device: torch.device) -> str | None:
    """Why the device has no product of the 8-bit format, or None; no product needs nothing."""
    if format_name not in _STEP:
        return None
    if device.type == "cpu":
        return None if format_name == "int8_row" else "the CPU has no fp8 matrix product"
    if device.type != "cuda":
        return f"no 8-bit matrix product is known for {device.type}"
    wanted = _FP8_CAPABILITY if format_name == "fp8_row" else _INT8_CAPABILITY
    found = torch.cuda.get_device_capability(device)
    if found < wanted:
        have, need = (".".join(map(str, pair)) for pair in (found, wanted))
        return f"{format_name} needs compute capability {need}, the device has {have}"
    return None


def refused_shape(
    format_name: str | None, device: torch.device, rows: Any, k: int, n: int, dtype: torch.dtype
) -> str | None:
    """Why the device's product of the format does not take a layer [rows, K] x [K, N], or None."""
    if format_name == "int8_row" and device.type == "cpu" and k == 1:
        return "K = 1: torch's integer product on the CPU gives zeros"
    if format_name not in _STEP or device.type != "cuda":
        return None
    step = _STEP[format_name]
    for name, size in (("K", k), ("N", n)):
        if size % step:
            return f"{name} = {size} is no multiple of {step}, as {format_name} on CUDA needs"
    if format_name == "fp8_row" and dtype not in (torch.bfloat16, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        return f"the layer computes in {kind}, and the fp8 product gives bfloat16"
    if format_name == "int8_row" and not statically_known_true(rows > _INT8_ROWS):
        return f"{rows} rows: int8_row on CUDA needs more than {_INT8_ROWS}"
    return None

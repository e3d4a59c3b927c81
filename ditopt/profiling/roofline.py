"""Costs on a device that is not present: what its peak rates allow at best.

An operator takes at least its FLOPs over the peak rate and its bytes over the memory bandwidth,
whichever is longer. Real kernels reach a part of that, so times are too short, and those of sparse
attention more than dense ones; a plan made from them says so and is to be measured on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditopt.errors import ProfileError, did_you_mean
from ditopt.plan import Hardware
from ditopt.profiling.schema import AttentionCost, Costs, SiteShape

if TYPE_CHECKING:
    from ditopt.plan import Block
    from ditopt.profiling.schema import Profile

_DENSITIES = (1.0, 0.5, 0.25, 0.1)
_SIXTEEN_BIT = ("float16", "bfloat16")


@dataclass(frozen=True)
class Device:
    """Peak rates from the vendor's datasheet: dense 16-bit and 32-bit FLOP/s, and bytes/s."""

    half_flops: float
    single_flops: float
    bytes_per_s: float


DEVICES: Mapping[str, Device] = {
    # NVIDIA A100, H100, H200 and L40S Tensor Core GPU datasheets; rates without sparsity, 32-bit
    # ones outside the tensor cores. AMD Instinct MI300X datasheet.
    "A100-SXM-80GB": Device(312e12, 19.5e12, 2.039e12),
    "H100-SXM": Device(989.4e12, 67e12, 3.35e12),
    "H200-SXM": Device(989.4e12, 67e12, 4.8e12),
    "L40S": Device(362e12, 91.6e12, 0.864e12),
    "MI300X": Device(1307.4e12, 163.4e12, 5.3e12),
}


def find_device(name: str) -> Device:
    """A device by its name in the table.

    Raises:
        ProfileError: an unknown name, with the known ones.
    """
    if name not in DEVICES:
        raise ProfileError(
            f"no peak rates are known of the device {name!r}",
            remedy=f"{did_you_mean(name, DEVICES)} Known: {', '.join(DEVICES)}.",
        )
    return DEVICES[name]


def hardware_of(name: str) -> Hardware:
    """What a profile and its plans say about a device that is not present."""
    find_device(name)
    return Hardware(device="cuda", name=name, torch=torch.__version__, threads=1)


def roofline_costs(
    model: nn.Module, inputs: Mapping[str, Any], profile: Profile, name: str
) -> Costs:
    """Costs of the profile's model on a device of the table.

    Args:
        model: runs one call here to count its FLOPs.
        inputs: of one call, by the forward's names.
        profile: with the sites' shapes.
        name: of the device.
    """
    device = find_device(name)
    total, outside = _count(model, inputs)
    blocks = f"{_stack_name(model)}."
    weights = {name: p.nbytes for name, p in model.named_parameters()}
    others = sum(size for name, size in weights.items() if not name.startswith(blocks))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Costs(
        dense_call_ms=_ms(device, dtype, total, sum(weights.values())),
        skip_call_ms=_ms(device, dtype, outside, others),
        attention=tuple(
            roofline_attention(shape, profile.block, device)
            for shape in sorted(set(profile.shapes.values()), key=lambda s: s.tokens)
        ),
        source="roofline",
    )


def roofline_attention(shape: SiteShape, block: Block, device: Device) -> AttentionCost:
    """Dense and sparse attention of one shape."""
    tokens = shape.batch * shape.heads * shape.tokens
    width = torch.finfo(getattr(torch, shape.dtype)).bits // 8
    moved = 4.0 * tokens * shape.head_dim * width
    pairs = 4.0 * tokens * shape.head_dim

    def ms(keys: float) -> float:
        return _ms(device, shape.dtype, pairs * keys, moved)

    pooled = -(-shape.tokens // block.k)
    return AttentionCost(
        shape=shape,
        dense_ms=ms(shape.tokens),
        sparse_ms=tuple((d, ms(d * shape.tokens)) for d in _DENSITIES),
        mean_ms=tuple((d, ms(d * shape.tokens + (1 - d) * pooled)) for d in _DENSITIES),
    )


def _ms(device: Device, dtype: str, flops: float, moved: float) -> float:
    rate = device.half_flops if dtype in _SIXTEEN_BIT else device.single_flops
    return 1e3 * max(flops / rate, moved / device.bytes_per_s)


def _stack_name(model: nn.Module) -> str:
    """The list of modules that holds most parameters: the blocks."""
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    return max(lists, key=lambda name: lists[name], default="")


def _count(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[float, float]:
    """FLOPs of one call, and of what is outside of the blocks."""
    stack = _stack_name(model)
    inside = 0.0
    counter = FlopCounterMode(display=False)
    # The counter knows the matrix products that attention is made of.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    for path, operators in counter.get_flop_counts().items():
        own = path.partition(".")[2]
        if stack and own.startswith(f"{stack}.") and own.removeprefix(f"{stack}.").isdigit():
            inside += sum(operators.values())
    total = float(counter.get_total_flops())
    return total, max(0.0, total - inside)

"""Measured time of linear layers by number format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ditopt.profiling.linear_schema import LinearCost
from ditopt.quantization import LinearRule
from ditopt.quantization.layer import STORED_FORMATS, compute, derive
from ditopt.quantization.limits import missing_hardware, refused_shape
from ditopt.timing import always_compiled, time_interleaved

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 7

MeasureLinears = Callable[
    [Sequence[tuple[int, int, int]], Sequence[str], torch.device, torch.dtype],
    tuple[LinearCost, ...],
]


def measure_linear_costs(
    shapes: Sequence[tuple[int, int, int]],
    formats: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[LinearCost, ...]:
    """Time each shape [M, K, N] by format, the least of several rounds.

    What the device cannot multiply is left out.
    """
    found = []
    for rows, k, n in shapes:
        x, weight, bias = (
            torch.randn(*size, device=device, dtype=dtype) for size in ((rows, k), (n, k), (n,))
        )
        plain = torch.compile(F.linear, dynamic=False)
        runs: dict[str, Any] = {"plain": lambda a=(x, weight, bias), f=plain: f(*a)}
        for name in formats:
            if missing_hardware(name, device) or refused_shape(name, device, rows, k, n, dtype):
                continue
            runs[name] = _run_of(name, x, weight, bias)
        with always_compiled():
            times = time_interleaved(runs, _ROUNDS)
        found.append(
            LinearCost(
                shape=(rows, k, n),
                plain_ms=times["plain"].least_ms,
                format_ms={name: times[name].least_ms for name in formats if name in times},
            )
        )
    return tuple(found)


def what_is_left_out(rules: Sequence[LinearRule], device: torch.device) -> tuple[str, ...]:
    """Formats of the rules that the search does not offer, and why."""
    reasons = {rule.product: missing_hardware(rule.product, device) for rule in rules}
    notes = [f"{name} is not offered: {reason}" for name, reason in reasons.items() if reason]
    stored = sorted({rule.format for rule in rules if rule.format in STORED_FORMATS})
    return (*notes, *(f"{name} is not offered: it is smaller, not faster" for name in stored))


def _run_of(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    rule = LinearRule.model_validate({"format": name})
    made = derive(rule, [weight], [], {})
    n, k = weight.shape

    def layer(x: Tensor) -> Any:
        return compute(rule, x, made, bias, n=n, k=k, dtype=x.dtype, native=True)

    compiled = torch.compile(layer, dynamic=False)
    return lambda: compiled(x)

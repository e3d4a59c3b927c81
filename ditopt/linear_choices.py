"""What a plan chooses at the linear layers of a captured model, or why it cannot be followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditopt.errors import WeightError
from ditopt.quantization.codebook import CALIBRATED
from ditopt.quantization.transforms import NEEDS

if TYPE_CHECKING:
    from ditopt.capture import Captured
    from ditopt.quantization import LinearRule
    from ditopt.sites import LinearSite

Statistics = Mapping[str, Mapping[str, Tensor]]


def statistics_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Statistics of input channels by layer, from a plan's tensors `linear/<name>/<layer>`."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        name, _, site = rest.partition("/")
        if kind == "linear":
            found.setdefault(site, {})[name] = value
    return found


def linear_choices(
    captured: Captured,
    sites: Sequence[LinearSite],
    inputs: Sequence[Any],
    rules: Mapping[str, LinearRule],
    statistics: Statistics,
) -> dict[str, LinearRule | str]:
    """For each layer that the plan names and the graph has, its rule or the reason against it.

    Args:
        captured: the graph.
        sites: its linear layers.
        inputs: the values of its first call.
        rules: of one phase of the plan.
        statistics: of the layers' input channels, from the plan's side file.

    Raises:
        WeightError: an earlier compilation released a weight.
    """
    readers: dict[int, int] = {}
    for piece in captured.pieces:
        for slot in set(piece.inputs):
            readers[slot] = readers.get(slot, 0) + 1
    shared = {
        site.weight
        for k, site in enumerate(sites)
        if site.weight is not None
        and (readers[site.weight] > 1 or any(site.weight == s.weight for s in sites[:k]))
    }
    found: dict[str, LinearRule | str] = {}
    for site in sites:
        rule = rules.get(site.id)
        if rule is not None:
            reason = _reason(captured, site, inputs, shared)
            reason = reason or _missing(rule, statistics.get(site.id, {}), site)
            found[site.id] = reason or rule
    return found


def _reason(
    captured: Captured, site: LinearSite, inputs: Sequence[Any], shared: set[int]
) -> str | None:
    if captured.prefix:
        return (
            f"a graph break makes {captured.prefix} a graph of its own, which equal modules share"
        )
    if site.weight is None:
        return "its weight is computed, not a parameter"
    if site.weight in shared:
        return "the weight is tied: another operator reads it too"
    weight = inputs[site.weight]
    if type(weight) not in (Tensor, nn.Parameter):
        return f"the weight is a {type(weight).__name__}, quantized by another library already"
    if not weight.is_floating_point() or weight.itemsize < 2:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')} already"
    if weight.numel() and not weight.untyped_storage().size():
        raise WeightError(
            f"the weight of {site.id} was let go by an earlier compilation (release_weights)",
            remedy="Compile once for all shapes (dynamic=True), or switch release_weights off.",
        )
    if not bool(torch.isfinite(weight.detach()).all()):
        return "the weight holds NaN or infinity"
    return None


def _missing(rule: LinearRule, statistics: Mapping[str, Tensor], site: LinearSite) -> str | None:
    n, k = site.out_features, site.in_features
    if rule.calibrated:
        if not statistics.keys() >= set(CALIBRATED):
            return "the plan's side file holds no calibrated codebook of the layer"
        found = tuple(statistics["codes"].shape)
        if found != (n, k // 4):
            return f"the plan's codes have shape {found}, the layer has N = {n}, K = {k}"
    if rule.static is not None:
        found = tuple(statistics["range_amax"].shape) if "range_amax" in statistics else (0, k)
        if found[1:] != (k,) or found[0] <= rule.static:
            return f"range {rule.static} of the statistic 'range_amax' [ranges, {k}] is missing"
    for name in NEEDS[rule.transform]:
        if name not in statistics:
            return f"transform {rule.transform!r} needs the statistic {name!r}, not in the plan"
        if statistics[name].shape != (k,):
            shape = tuple(statistics[name].shape)
            return f"the plan's statistic {name!r} has shape {shape}, the layer has K = {k}"
    return None

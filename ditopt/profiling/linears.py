"""Number formats of linear layers: error by timestep range, outliers, measured time.

Layers that read one tensor (q, k and v; gate and up) are one group with one choice, as one matrix
product computes them. Errors are those of the group's output on recorded rows of its input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from ditopt import files, fingerprint
from ditopt.profiling.linear_costs import (
    MeasureLinears,
    measure_linear_costs,
    what_is_left_out,
)
from ditopt.profiling.linear_schema import (
    LINEARS_NAME,
    TENSORS_NAME,
    LinearCost,
    LinearGroup,
    LinearProfile,
    load_statistics,
)
from ditopt.profiling.linear_watcher import LinearWatcher
from ditopt.profiling.loops import only_model, plain_loop
from ditopt.progress import Progress, silent
from ditopt.quantization import LinearRule
from ditopt.quantization.layer import ROW_FORMATS
from ditopt.quantization.statistics import plan_tensors, range_tensors

if TYPE_CHECKING:
    from torch import nn

    from ditopt.workload import Workload

__all__ = [
    "CANDIDATES",
    "LINEARS_NAME",
    "LinearCost",
    "LinearGroup",
    "LinearProfile",
    "MeasureLinears",
    "load_statistics",
    "measure_linear_costs",
    "profile_linears",
]

CANDIDATES = (
    LinearRule(format="fp8_row"),
    LinearRule(format="fp8_row", transform="centre"),
    LinearRule(format="int8_row"),
    LinearRule(format="int8_row", transform="balance"),
)


def profile_linears(
    workload: Workload,
    out: str | os.PathLike[str],
    progress: Progress = silent,
    *,
    rules: Sequence[LinearRule] = CANDIDATES,
    ranges: int = 4,
    rows: int = 256,
    min_rows: int = 256,
    measure: MeasureLinears | None = None,
) -> LinearProfile:
    """Measure every linear layer of many rows over one sampling loop.

    Args:
        workload: a model and its denoising loop; seed 0 is run.
        out: folder for linears.json and the channels' statistics.
        progress: told after the loop and after each shape.
        rules: what to try.
        ranges: number of ranges of calls.
        rows: recorded rows of each group's input, per range.
        min_rows: layers with fewer are left alone (modulation, embeddings).
        measure: measures the costs, by default on random data of each shape.
    """
    from ditopt.observe import observe

    model = only_model(workload)
    trace, _ = plain_loop(workload)
    calls = trace.calls_per_branch
    edges = [round(calls * k / ranges) for k in range(ranges + 1)]
    spans = tuple((a, b) for a, b in pairwise(edges) if b > a)
    watcher = LinearWatcher(spans, len(trace.calls), rows, min_rows)
    observed = observe(model, watcher)
    order = iter(trace.calls)

    def denoiser(*args: Any, **kwargs: Any) -> Any:
        watcher.call = next(order).index
        return observed(*args, **kwargs)

    with torch.no_grad():
        workload.run(0, dict.fromkeys(workload.models, denoiser))
        groups = tuple(group.measure(rules) for group in watcher.groups.values())
        progress("linear layers", 1, 2)
        device = next(model.parameters()).device
        shapes = sorted({group.shape for group in groups})
        formats = sorted({rule.format for rule in rules if rule.format in ROW_FORMATS})
        costs = (measure or measure_linear_costs)(shapes, formats, device, _dtype(model))
    profile = LinearProfile(
        weights=fingerprint.weights(model),
        rules=tuple(rules),
        ranges=spans,
        groups=groups,
        costs=costs,
        notes=what_is_left_out(rules, device),
    )
    files.make_folder(Path(out))
    seen = {member: g.whole for g in watcher.groups.values() for member in g.members}
    by_range = {member: g.ranges for g in watcher.groups.values() for member in g.members}
    with files.atomic_path(Path(out) / TENSORS_NAME) as temporary:
        tensors = plan_tensors(seen) | range_tensors(by_range)
        temporary.write_bytes(safetensors.torch.save(tensors))
    files.write_json(Path(out) / LINEARS_NAME, profile.model_dump(mode="json"))
    progress("linear layers", 2, 2)
    return profile


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the model's weights, norms aside."""
    return next(p.dtype for p in model.parameters() if p.dim() >= 2)

"""Number formats of linear layers: error by timestep range, outliers, measured time.

Layers that read one tensor (q, k and v; gate and up) are one group with one choice, as one matrix
product computes them. Errors are those of the group's output on recorded rows of its input.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from ditopt import files, fingerprint
from ditopt.errors import ProfileError
from ditopt.plan import LinearRecord
from ditopt.profiling.loops import only_model, plain_loop
from ditopt.progress import Progress, silent
from ditopt.quantization import LinearRule
from ditopt.quantization.layer import ROW_FORMATS, STORED_FORMATS, compute, derive
from ditopt.quantization.limits import missing_hardware, refused_shape
from ditopt.quantization.statistics import InputStatistics, plan_tensors
from ditopt.timing import time_interleaved

if TYPE_CHECKING:
    from ditopt.sites import LinearSite
    from ditopt.workload import Workload

LINEARS_NAME = "linears.json"
_TENSORS_NAME = "linears.safetensors"
_ROUNDS = 7

CANDIDATES = (
    LinearRule(format="fp8_row"),
    LinearRule(format="fp8_row", transform="centre"),
    LinearRule(format="int8_row"),
    LinearRule(format="int8_row", transform="balance"),
)

MeasureLinears = Callable[
    [Sequence[tuple[int, int, int]], Sequence[str], torch.device, torch.dtype],
    "tuple[LinearCost, ...]",
]

_Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearGroup(_Part):
    """Layers that read one tensor.

    Attributes:
        members: their ids, in execution order.
        rows: M, tokens of all samples.
        in_features: K.
        out_features: N of each member.
        error: [rules][ranges] squared error of the output over its squared norm.
        outliers: of the input over all calls, see `InputStatistics.outliers`.
        range_amax: largest magnitude of the input in each range; the scale of a static format.
    """

    members: tuple[str, ...]
    rows: int
    in_features: int
    out_features: tuple[int, ...]
    error: tuple[tuple[_Error, ...], ...]
    outliers: dict[str, float]
    range_amax: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, K and the members' N together."""
        return (self.rows, self.in_features, sum(self.out_features))

    @property
    def range_ratio(self) -> float:
        """Largest over smallest `range_amax`: above 4, one static scale is unsafe."""
        return max(self.range_amax) / max(min(self.range_amax), 1e-30)


class LinearCost(_Part):
    """Measured time of one shape [M, K, N], as it is and by format, rounding included."""

    shape: tuple[int, int, int]
    plain_ms: _Milliseconds
    format_ms: dict[str, _Milliseconds]


class LinearProfile(_Part):
    """What is known about the linear layers of one workload, but the tensors.

    Attributes:
        ditopt_linear_profile: version of this schema.
        weights: fingerprint of the model's values.
        rules: what was tried.
        ranges: half-open ranges of calls.
        groups: the layers.
        costs: one for each distinct shape; formats that the device does not multiply are left out.
        notes: what was left out, and why.
    """

    ditopt_linear_profile: Literal[1] = 1
    weights: str
    rules: tuple[LinearRule, ...]
    ranges: tuple[tuple[int, int], ...]
    groups: tuple[LinearGroup, ...]
    costs: tuple[LinearCost, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> tuple[LinearRecord, ...]:
        """The layers as a plan records them."""
        return tuple(
            LinearRecord(id=member, in_features=group.in_features, out_features=n)
            for group in self.groups
            for member, n in zip(group.members, group.out_features, strict=True)
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self | None:
        """What `profile_linears` wrote, or None where it was not run.

        Raises:
            ProfileError: malformed.
        """
        path = Path(folder) / LINEARS_NAME
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(files.read_text(path))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ProfileError(
                f"{LINEARS_NAME}: {where}: {first['msg']}", remedy="Profile the layers again."
            ) from error


def load_statistics(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors for a plan's side file, as `quantization.statistics.plan_tensors` names them."""
    return safetensors.torch.load((Path(folder) / _TENSORS_NAME).read_bytes())


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
    watcher = _Watcher(spans, len(trace.calls), rows, min_rows)
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
        notes=_notes(rules, device),
    )
    files.make_folder(Path(out))
    seen = {member: g.whole for g in watcher.groups.values() for member in g.members}
    with files.atomic_path(Path(out) / _TENSORS_NAME) as temporary:
        temporary.write_bytes(safetensors.torch.save(plan_tensors(seen)))
    files.write_json(Path(out) / LINEARS_NAME, profile.model_dump(mode="json"))
    progress("linear layers", 2, 2)
    return profile


@dataclass
class _Group:
    """What is seen of one group."""

    rows: int
    whole: InputStatistics
    ranges: list[InputStatistics]
    samples: list[list[Tensor]]
    members: list[str] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)

    def measure(self, rules: Sequence[LinearRule]) -> LinearGroup:
        """Errors of each rule on the recorded rows."""
        bias = torch.cat(self.biases).float()
        statistics = {"mean": self.whole.mean.float(), "amax": self.whole.amax.float()}
        weight = torch.cat(self.weights).float()
        n, k = weight.shape
        rows = []
        for rule in rules:
            made = derive(rule, [weight], [bias], statistics)
            # Float32 sums of 8-bit products are the integers' up to rounding.
            sizes: dict[str, Any] = {"n": n, "k": k, "dtype": torch.float32, "native": False}
            errors = []
            for sample in self.samples:
                x = torch.cat(sample)
                exact = F.linear(x, weight, bias)
                y = compute(rule, x, made, bias, **sizes)
                norm = exact.double().square().sum().clamp(min=1e-30)
                errors.append(float((y - exact).double().square().sum() / norm))
            rows.append(tuple(errors))
        return LinearGroup(
            members=tuple(self.members),
            rows=self.rows,
            in_features=k,
            out_features=tuple(w.shape[0] for w in self.weights),
            error=tuple(rows),
            outliers=self.whole.outliers(),
            range_amax=tuple(float(seen.amax.max()) for seen in self.ranges),
        )


class _Watcher:
    """The observer: statistics of every input, and a few of its rows."""

    def __init__(
        self, ranges: Sequence[tuple[int, int]], calls: int, rows: int, min_rows: int
    ) -> None:
        self.call = 0
        self.groups: dict[tuple[int, str], _Group] = {}
        self._ranges = ranges
        self._take = max(1, -(-rows * len(ranges) // calls))
        self._min_rows = min_rows
        self._draw = torch.Generator().manual_seed(0)

    def suggest_layout(self, layout: Any) -> None:
        """Nothing here depends on the grid."""

    def attention(self, *args: Any, **kwargs: Any) -> None:
        """Attentions are profiled by `ProfileObserver`."""

    def stack(self, base: Any, outputs: Any) -> None:
        """So is the block stack."""

    def linear(
        self, site: LinearSite, source: str, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        """Take in a layer; its input once for the group."""
        count = x.numel() // x.shape[-1]
        if count < self._min_rows or site.weight is None:
            return
        place = (site.piece, source)
        if place not in self.groups:
            sums = [InputStatistics.empty(x.shape[-1], x.device) for _ in (0, *self._ranges)]
            self.groups[place] = _Group(count, sums[0], sums[1:], [[] for _ in self._ranges])
        group = self.groups[place]
        if site.id not in group.members:
            group.members.append(site.id)
            group.weights.append(weight.detach())
            group.biases.append(weight.new_zeros(len(weight)) if bias is None else bias.detach())
        if site.id != group.members[0]:
            return
        number = next(r for r, (a, b) in enumerate(self._ranges) if a <= self.call < b)
        rows = x.detach().reshape(count, -1)
        group.whole.add(rows)
        group.ranges[number].add(rows)
        picked = torch.randint(count, (self._take,), generator=self._draw).to(x.device)
        group.samples[number].append(rows[picked].float())


def measure_linear_costs(
    shapes: Sequence[tuple[int, int, int]],
    formats: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[LinearCost, ...]:
    """Time each shape [M, K, N] by format; what the device cannot multiply is left out."""
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
        times = time_interleaved(runs, _ROUNDS)
        found.append(
            LinearCost(
                shape=(rows, k, n),
                plain_ms=times["plain"].median_ms,
                format_ms={name: times[name].median_ms for name in formats if name in times},
            )
        )
    return tuple(found)


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the model's weights, norms aside."""
    return next(p.dtype for p in model.parameters() if p.dim() >= 2)


def _run_of(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    rule = LinearRule.model_validate({"format": name})
    made = derive(rule, [weight], [], {})
    n, k = weight.shape

    def layer(x: Tensor) -> Any:
        return compute(rule, x, made, bias, n=n, k=k, dtype=x.dtype, native=True)

    compiled = torch.compile(layer, dynamic=False)
    return lambda: compiled(x)


def _notes(rules: Sequence[LinearRule], device: torch.device) -> tuple[str, ...]:
    reasons = {rule.format: missing_hardware(rule.format, device) for rule in rules}
    notes = [f"{name} is not offered: {reason}" for name, reason in reasons.items() if reason]
    stored = sorted({rule.format for rule in rules if rule.format in STORED_FORMATS})
    return (*notes, *(f"{name} is not offered: it is smaller, not faster" for name in stored))

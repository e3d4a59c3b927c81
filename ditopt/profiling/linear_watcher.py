"""The observer of linear layers: statistics of every input, and a few of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ditopt.errors import ProfileError
from ditopt.profiling.linear_schema import LinearGroup
from ditopt.quantization.layer import compute, derive, misfit
from ditopt.quantization.statistics import InputStatistics, fluctuation

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.quantization import LinearRule
    from ditopt.sites import LinearSite


@dataclass
class WatchedGroup:
    """What is seen of one group."""

    rows: int
    whole: InputStatistics
    ranges: list[InputStatistics]
    samples: list[list[Tensor]]
    members: list[str] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)

    def measure(self, rules: Sequence[LinearRule]) -> LinearGroup:
        """Errors of each rule on the recorded rows.

        Raises:
            ProfileError: a rule that no layer of this width can have.
        """
        bias = torch.cat(self.biases).float()
        statistics = {
            "mean": self.whole.mean.float(),
            "amax": self.whole.amax.float(),
            "range_amax": torch.stack([seen.amax for seen in self.ranges]).float(),
        }
        weight = torch.cat(self.weights).float()
        n, k = weight.shape
        errors, turns = [], []
        for rule in rules:
            reason = misfit(rule, k)
            if reason is not None:
                raise ProfileError(
                    f"{self.members[0]}: {reason}", remedy="Leave the rule out of `rules`."
                )
            made = derive(rule, [weight], [bias], statistics)
            # Float32 sums of 8-bit products are the integers' up to rounding.
            sizes: dict[str, Any] = {"n": n, "k": k, "dtype": torch.float32, "native": False}
            inputs = [torch.cat(sample) for sample in self.samples]
            exact = [F.linear(x, weight, bias).double() for x in inputs]
            found = [compute(rule, x, made, bias, **sizes).double() for x in inputs]
            errors.append(tuple(map(_relative, found, exact)))
            turns.append(tuple(map(_turn, found, exact)))
        return LinearGroup(
            members=tuple(self.members),
            rows=self.rows,
            in_features=k,
            out_features=tuple(w.shape[0] for w in self.weights),
            error=tuple(errors),
            outliers={**self.whole.outliers(), "fluctuation": fluctuation(self.whole, weight)},
            range_amax=tuple(float(seen.amax.max()) for seen in self.ranges),
            direction_error=tuple(turns),
        )


def _relative(found: Tensor, exact: Tensor) -> float:
    """Squared error over squared norm."""
    return float((found - exact).square().sum() / exact.square().sum().clamp(min=1e-30))


def _turn(found: Tensor, exact: Tensor) -> float:
    """Mean of 1 - cosine over rows; rows are near enough for the difference to be exact."""
    cosines = F.cosine_similarity(found, exact, dim=1, eps=1e-30)
    return float((1 - cosines).clamp(min=0).mean())


class LinearWatcher:
    """The observer: statistics of every input, and a few of its rows."""

    def __init__(
        self, ranges: Sequence[tuple[int, int]], calls: int, rows: int, min_rows: int
    ) -> None:
        self.call = 0
        self.groups: dict[tuple[int, str], WatchedGroup] = {}
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
            self.groups[place] = WatchedGroup(count, sums[0], sums[1:], [[] for _ in self._ranges])
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

"""Linear layers in the search: groups of layers beside the heads of attentions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ditopt.errors import ProfileError
from ditopt.quantization.layer import operands
from ditopt.search.sensitivity import Alternative, Site, untouched
from ditopt.search.trajectory import call_moves

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ditopt.caching import CacheSchedule
    from ditopt.plan import Plan
    from ditopt.profiling.linears import LinearGroup, LinearProfile
    from ditopt.profiling.schema import SeedRecord
    from ditopt.quantization import LinearRule
    from ditopt.search.sensitivity import Choice, Floats


class LinearChoices:
    """What can be chosen at the linear layers, and what a choice says in a plan.

    Layers that read one tensor (q, k and v) are one site: they have one format. A format holds at
    every call, so that the weight it replaces is not needed any more.

    Args:
        profile: of the layers.
        statistics: tensors that transforms need, by their name in a plan's side file.
        records: of the profiled seeds.
        dtype: of the weights.
    """

    def __init__(
        self,
        profile: LinearProfile,
        statistics: Mapping[str, Tensor],
        records: Sequence[SeedRecord],
        dtype: torch.dtype,
    ) -> None:
        self.profile = profile
        self._statistics, self._records, self._dtype = statistics, records, dtype
        self._costs = {cost.shape: cost for cost in profile.costs}
        self._groups = {_name(group): group for group in profile.groups}
        self._first = {member: group for group in profile.groups for member in group.members}

    def sites(self, schedule: CacheSchedule | None = None) -> list[Site]:
        """One site for each group that some format makes faster or smaller.

        Errors are the relative squared error of the output at each call, weighted as `trajectory`
        says, over the number of groups.
        """
        weights = self._weights(0, None, schedule)
        found = []
        for name, group in self._groups.items():
            cost, plain_bytes = self._costs[group.shape], self._plain_bytes(group)
            alternatives = [untouched(1, cost.plain_ms, plain_bytes, "plain")]
            for number, rule in enumerate(self.profile.rules):
                ms = cost.format_ms.get(rule.format, math.inf)
                size = self._bytes(group, rule)
                if ms < cost.plain_ms or (math.isfinite(ms) and size < plain_bytes):
                    error = float(np.dot(weights, group.error[number])) / len(self._groups)
                    alternatives.append(
                        Alternative(
                            name=f"{rule.format} {rule.transform}",
                            fixed_ms=ms,
                            bytes=size,
                            option_ms=np.zeros(1),
                            error=np.array([[error]]),
                            options=(number,),
                        )
                    )
            if len(alternatives) > 1:
                found.append(Site(name, "linears", 0, tuple(alternatives)))
        return found

    def rules(self, choices: Mapping[str, Choice], sites: Sequence[Site]) -> dict[str, LinearRule]:
        """The plan's rules for what was chosen; other sites are passed over."""
        found = {}
        for site in sites:
            if site.id in self._groups and site.id in choices:
                (option,) = site.alternatives[choices[site.id][0]].options
                rule = self.profile.rules[option]
                found.update(dict.fromkeys(self._groups[site.id].members, rule))
        return found

    def energy(self, plan: Plan, schedule: CacheSchedule | None) -> float:
        """The error of any plan whose formats the profile has measured.

        Raises:
            ProfileError: it has not.
        """
        total = 0.0
        for phase in plan.phases:
            start, stop = phase.calls
            weights = self._weights(start, stop, schedule)
            seen = set()
            for layer, rule in phase.linear.items():
                group = self._first.get(layer)
                if group is None or rule not in self.profile.rules:
                    raise ProfileError(
                        f"the profile has not measured {rule.format!r} at {layer!r}",
                        remedy="Profile the layers again, or leave the rule out.",
                    )
                if group.members[0] not in seen:
                    seen.add(group.members[0])
                    total += float(np.dot(weights, group.error[self.profile.rules.index(rule)]))
        return total / max(1, len(self._groups))

    def tensors(self, rules: Mapping[str, LinearRule]) -> dict[str, Tensor]:
        """The statistics that the rules' transforms and static scales need."""
        layers = [
            layer
            for layer, rule in rules.items()
            if rule.transform != "none" or rule.static is not None
        ]
        return {
            key: value
            for key, value in self._statistics.items()
            if any(key.endswith(f"/{layer}") for layer in layers)
        }

    @property
    def plain_ms(self) -> float:
        """One call of all groups as they are."""
        return sum(self._costs[group.shape].plain_ms for group in self.profile.groups)

    @property
    def plain_bytes(self) -> int:
        """Weights of all groups as they are."""
        return sum(self._plain_bytes(group) for group in self.profile.groups)

    def _plain_bytes(self, group: LinearGroup) -> int:
        return sum(group.out_features) * group.in_features * self._dtype.itemsize

    def _bytes(self, group: LinearGroup, rule: LinearRule) -> int:
        made = operands(rule, sum(group.out_features), group.in_features, self._dtype)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in made.values())

    def _weights(self, start: int, stop: int | None, schedule: CacheSchedule | None) -> Floats:
        """Of each range, mean over seeds: weights of its calls from `start` to `stop`."""
        found = []
        for record in self._records:
            weights = call_moves(record, start, schedule, stop) ** 2
            found.append([float(weights[a:b].sum()) for a, b in self.profile.ranges])
        mean: Floats = np.mean(found, axis=0)
        return mean


def _name(group: LinearGroup) -> str:
    return "+".join(group.members)

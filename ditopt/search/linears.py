"""Linear layers in the search: groups of layers beside the heads of attentions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ditopt.search.problem import SiteOptions

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.profiling.linears import LinearGroup, LinearProfile
    from ditopt.profiling.schema import SeedRecord
    from ditopt.quantization import LinearRule


class LinearChoices:
    """What can be chosen at the linear layers, and what a choice says in a plan.

    Args:
        profile: of the layers.
        statistics: tensors that transforms need, by their name in a plan's side file.
    """

    def __init__(self, profile: LinearProfile, statistics: Mapping[str, Tensor]) -> None:
        self.profile = profile
        self._statistics = statistics
        self._costs = {cost.shape: cost for cost in profile.costs}
        self._groups = {_name(group): group for group in profile.groups}

    def options(self, records: Sequence[SeedRecord], first_call: int) -> list[SiteOptions]:
        """One site for each group that some format makes faster.

        Errors are in the units of `problem.site_options`: the relative squared error of the output
        at each call, weighted by the step that the call leads to, over the number of groups.
        """
        weights = np.mean([self._weights(record, first_call) for record in records], axis=0)
        found = []
        for name, group in self._groups.items():
            cost = self._costs[group.shape]
            offered = [(k, cost.format_ms[r.format]) for k, r in self._offered(group)]
            if offered:
                error = [np.dot(weights, group.error[k]) / len(self._groups) for k, _ in offered]
                found.append(
                    SiteOptions(
                        id=name,
                        dense_ms=cost.plain_ms,
                        fixed_ms=0.0,
                        option_ms=np.array([ms for _, ms in offered]),
                        error=np.array([error]),
                    )
                )
        return found

    def rules(self, options: Mapping[str, tuple[int, ...]]) -> dict[str, LinearRule]:
        """The plan's rules for what an assignment chose; other sites are passed over."""
        found = {}
        for name, (option, *_) in options.items():
            group = self._groups.get(name)
            if group is not None:
                rule = self._offered(group)[option][1]
                found.update(dict.fromkeys(group.members, rule))
        return found

    def tensors(self, rules: Mapping[str, LinearRule]) -> dict[str, Tensor]:
        """The statistics that the rules' transforms need."""
        layers = [layer for layer, rule in rules.items() if rule.transform != "none"]
        return {
            key: value
            for key, value in self._statistics.items()
            if any(key.endswith(f"/{layer}") for layer in layers)
        }

    def _offered(self, group: LinearGroup) -> list[tuple[int, LinearRule]]:
        """Rules that are faster than the layer as it is, with their number in the profile."""
        cost = self._costs[group.shape]
        return [
            (k, rule)
            for k, rule in enumerate(self.profile.rules)
            if cost.format_ms.get(rule.format, cost.plain_ms) < cost.plain_ms
        ]

    def _weights(self, record: SeedRecord, first_call: int) -> list[float]:
        """Of each range: sum over its calls from `first_call` on of ``g_t sum(g)``."""
        steps = record.step_energy.sqrt().numpy()
        whole = float(steps[first_call:].sum())
        return [
            float(steps[max(start, first_call) : max(stop, first_call)].sum()) * whole
            for start, stop in self.profile.ranges
        ]


def _name(group: LinearGroup) -> str:
    return "+".join(group.members)

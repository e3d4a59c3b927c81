"""The rules that quantization recipes may name, with their published settings as fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ditopt.errors import PlanError
from ditopt.plan import Phase
from ditopt.quantization import LinearRule
from ditopt.quantization.block_calibration import Calibration
from ditopt.recipes.quantization.base import Ground, Rule, bits
from ditopt.recipes.quantization.budget import Unit, raised

if TYPE_CHECKING:
    from ditopt.profiling.linears import LinearGroup
    from ditopt.recipes.quantization.base import Role

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]

OWN_METRIC: dict[Role, str] = {
    "self": "error",
    "ff": "error",
    "joint": "error",
    "cross": "direction_error",
}
"""What is asked of a layer's output: its size and direction, or, for text, what it says."""


class MixedPrecision(Rule):
    """ViDiT-Q: activations in 8 bits, weights in 8 or 4, balanced and rotated.

    Attributes:
        mean_bits: of a weight and what belongs to it; 16 / 6.4 is the published memory.
        per_range: formats may change between ranges of calls. A layer that has both is held in
            both, so this is for quality at equal arithmetic; without it, memory is as stated.
        transform: of every layer.
    """

    kind: Literal["mixed_precision"]
    mean_bits: Annotated[float, Field(ge=4, le=9)] = 6.4
    per_range: bool = True
    transform: Literal["none", "balance", "rotate"] = "rotate"

    def candidates(self) -> tuple[LinearRule, ...]:
        """Weights in 4 bits, then in 8."""
        return (
            LinearRule(format="int4_group", activation="int8_row", transform=self.transform),
            LinearRule(format="int8_row", transform=self.transform),
        )

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`.

        Raises:
            PlanError: even all in 4 bits are above the budget.
        """
        low, high = self.candidates()
        groups = ground.groups(low)
        spans = ground.linears.ranges
        pieces = [[r] for r in range(len(spans))] if self.per_range else [[*range(len(spans))]]
        places = [(k, piece) for piece in pieces for k in range(len(groups))]
        units = [self._unit(ground, groups[k], piece) for k, piece in places]
        calls = sum(stop - start for start, stop in spans)
        whole = calls * sum(g.in_features * sum(g.out_features) for g in groups)
        if sum(unit.low for unit in units) > self.mean_bits * whole:
            least = sum(unit.low for unit in units) / whole
            raise PlanError(f"the layers take at least {least:.2f} bits a weight")
        chosen = raised(units, self.mean_bits * whole)
        up = {(places[u][0], r) for u in chosen for r in places[u][1]}
        return tuple(
            Phase(
                calls=span,
                linear={
                    member: high if (k, r) in up else low
                    for k, group in enumerate(groups)
                    for member in group.members
                },
            )
            for r, span in enumerate(spans)
        )

    def _unit(self, ground: Ground, group: LinearGroup, ranges: list[int]) -> Unit:
        low, high = self.candidates()
        role = ground.role(group)
        spans = [ground.linears.ranges[r] for r in ranges]
        calls = [stop - start for start, stop in spans]

        def gain(metric: str) -> float:
            rows = getattr(group, metric)
            if not rows:
                raise PlanError(
                    f"the profile of linear layers knows no {metric}", remedy="Profile again."
                )
            lost, kept = (rows[ground.number(rule)] for rule in (low, high))
            gains = (n * (lost[r] - kept[r]) for n, r in zip(calls, ranges, strict=True))
            return float(sum(gains))

        return Unit(
            role=role,
            low=sum(calls) * bits(low, group),
            high=sum(calls) * bits(high, group),
            error=gain("error"),
            own=gain(OWN_METRIC[role]) / sum(calls),
        )


class AdaptiveRotation(Rule):
    """LRQ-DiT: twin-log weights; inputs rotated once, or twice where they fluctuate.

    Attributes:
        threshold: of the fluctuation J, from where the dual transform is used.
        activation: 8-bit format of the inputs.
    """

    kind: Literal["adaptive_rotation"]
    threshold: Annotated[float, Field(ge=0)] = 1.0
    activation: Literal["int8_row", "fp8_row"] = "int8_row"

    def candidates(self) -> tuple[LinearRule, ...]:
        """Of mild and of salient inputs."""
        return tuple(
            LinearRule(format="twin_log", activation=self.activation, transform=transform)
            for transform in ("rotate", "rotate_twice")
        )

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`.

        Raises:
            PlanError: the profile was made before it recorded J.
        """
        mild, salient = self.candidates()
        found: dict[str, LinearRule] = {}
        for group in ground.groups(mild):
            if "fluctuation" not in group.outliers:
                raise PlanError(
                    "the profile of linear layers knows no fluctuation", remedy="Profile again."
                )
            rule = salient if group.outliers["fluctuation"] >= self.threshold else mild
            found |= dict.fromkeys(group.members, rule)
        return (Phase(calls=(0, ground.profile.sampler.calls), linear=found),)


class CalibratedCodebook(Rule):
    """VQ4DiT: codebooks of 256 words of four weights, assignments calibrated without data.

    Attributes:
        nearest: candidate words of each piece.
        steps: of the optimizer, for each block.
        words_rate, ratio_rate: step sizes of words and of ratios' logits.
        settled: share of one candidate from which its piece is decided.
    """

    kind: Literal["calibrated_codebook"]
    nearest: Annotated[int, Field(ge=1, le=8)] = 2
    steps: Annotated[int, Field(ge=0, le=100_000)] = 500
    words_rate: Rate = 1e-4
    ratio_rate: Rate = 5e-2
    settled: Annotated[float, Field(gt=0.5, le=1)] = 0.99

    def calibration(self) -> Calibration:
        """Settings for `quantization.block_calibration.calibrate`."""
        return Calibration(**self.model_dump(exclude={"kind"}))

    def candidates(self) -> tuple[LinearRule, ...]:
        """One format."""
        return (LinearRule(format="codebook", calibrated=True),)

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`."""
        (rule,) = self.candidates()
        found = {member: rule for group in ground.groups(rule) for member in group.members}
        return (Phase(calls=(0, ground.profile.sampler.calls), linear=found),)


QuantizationRule = Annotated[
    MixedPrecision | AdaptiveRotation | CalibratedCodebook, Field(discriminator="kind")
]
"""Any of them, by `kind`."""

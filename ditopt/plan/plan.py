"""`Plan`: loading, saving, and the checks that need more than one part of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from torch import Tensor

from ditopt import files
from ditopt.errors import PlanError
from ditopt.layout import TokenLayout
from ditopt.plan import checks, side_file, yaml_text
from ditopt.plan.fields import Text
from ditopt.plan.records import (
    Goal,
    Hardware,
    ModelRecord,
    Predicted,
    Sampler,
    SideFile,
    Verification,
)
from ditopt.plan.schema import Block, Cache, Phase
from ditopt.token_order import TokenOrder


class Plan(BaseModel):
    """Every choice for one model and one sampling loop. Immutable; equal plans give equal files.

    Attributes:
        ditopt_plan: version of this schema.
        model: the model it belongs to.
        sampler: the loop it was made for.
        hardware: where costs were measured.
        goal: what was asked for; null in a plan written by hand.
        layout: token grid of the patterns; null where no pattern needs one.
        block: block sizes of the patterns.
        order: of the grid's tokens where patterns and selectors apply; null is raster.
        phases: choices by ranges of calls, contiguous from call 0 to the last.
        cache: which calls are forecast; null computes every call.
        predicted: what the search expected.
        verification: everything that was measured, in order.
        assumptions: what was not measured, in words.
        side_file: tensors that belong to the plan.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ditopt_plan: Literal[1] = 1
    model: ModelRecord
    sampler: Sampler
    hardware: Hardware
    goal: Goal | None = None
    layout: TokenLayout | None = None
    block: Block = Block()
    order: TokenOrder | None = None
    phases: tuple[Phase, ...]
    cache: Cache | None = None
    predicted: Predicted | None = None
    verification: tuple[Verification, ...] = ()
    assumptions: tuple[Text, ...] = ()
    side_file: SideFile | None = None

    _tensors: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: object) -> None:
        """Check what the parts say about each other."""
        checks.check_sampler(self.sampler)
        checks.check_phases(self.phases, self.sampler.calls)
        checks.check_rules(self.phases, self.model.sites, self.layout)
        checks.check_remainders(self.phases)
        checks.check_arithmetic(self.phases, self.model.sites)
        checks.check_orders(self.phases, self.order)
        checks.check_linear_rules(self.phases, self.model.linears)
        if self.cache is not None:
            checks.check_cache(self.cache, self.sampler.calls)

    def __eq__(self, other: object) -> bool:
        # Not as texts: Dynamo compares the plans of all callables that were compiled from a model
        # whenever another one of them is called.
        return self is other or (isinstance(other, Plan) and self.__dict__ == other.__dict__)

    def __hash__(self) -> int:
        return hash((self.model.weights, self.sampler.calls, len(self.phases)))

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the side file by name, on the CPU."""
        return self._tensors

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """A copy that holds `tensors`; `save` writes them beside the plan."""
        copy = self.model_copy()
        copy._tensors = dict(tensors)
        return copy

    def phase(self, call: int) -> Phase:
        """The phase of a call index."""
        return next(phase for phase in self.phases if phase.calls[0] <= call < phase.calls[1])

    def to_text(self) -> str:
        """The plan as YAML; the same plan gives the same text."""
        return yaml_text.dump(self.model_dump(mode="json"))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse and check YAML text; tensors are not loaded.

        Raises:
            PlanError: malformed text, an unknown key, or parts that contradict each other.
        """
        document = yaml_text.load(text)
        if not isinstance(document, dict):
            raise PlanError("expected a YAML mapping that starts with `ditopt_plan: 1`")
        version = document.get("ditopt_plan")
        if version != 1 or isinstance(version, bool):
            raise PlanError(
                f"ditopt_plan: expected version 1, got {version!r}",
                remedy="Make the plan anew with this version of ditopt.",
            )
        try:
            # Through JSON, where strict mode takes arrays for tuples but no text for numbers.
            return cls.model_validate_json(json.dumps(document, allow_nan=False), strict=True)
        except (ValidationError, ValueError) as error:
            raise PlanError(checks.describe(error)) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a plan and its side file.

        Raises:
            PlanError: malformed, or a side file that is missing, truncated or not the plan's own.
            FileError: the plan's file cannot be read.
        """
        path = Path(path)
        try:
            plan = cls.from_text(files.read_text(path))
        except PlanError as error:
            raise PlanError(f"{path.name}: {error.message}", remedy=error.remedy) from error
        if plan.side_file is None:
            return plan
        return plan.with_tensors(side_file.load(path.parent, plan.side_file))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, its side file first, each under a temporary name that is then renamed.

        Raises:
            FileError: the operating system refuses; what stood there before is untouched.
        """
        path = Path(path)
        written = self
        if self._tensors:
            record = side_file.save(path.with_suffix(".safetensors"), self._tensors)
            written = self.model_copy(update={"side_file": record})
        files.write_text(path, written.to_text())

    def validate_against(
        self, sites: tuple[checks.SiteLike, ...], architecture: str, weights: str
    ) -> tuple[str, ...]:
        """Check that the plan belongs to a captured model.

        Args:
            sites: the model's attention sites.
            architecture: its fingerprint of parameter names, shapes and dtypes.
            weights: its fingerprint of values.

        Returns:
            Warnings in words; empty for the very model that was profiled.

        Raises:
            PlanError: another architecture (says what differs), or other weights where the plan
                holds tensors derived from them.
        """
        checks.check_model(self.model, tuple(sites), architecture)
        if weights == self.model.weights:
            return ()
        if self.side_file is not None or self._tensors:
            raise PlanError(
                "model.weights: the plan holds tensors derived from the weights of another model",
                remedy="Profile and plan again with these weights.",
            )
        return ("quality not verified: the plan was made for other weights of this architecture",)

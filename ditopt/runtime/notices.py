"""`Notices`: what the user is told about sampling runs, once per topic."""

from __future__ import annotations

import warnings

from ditopt.errors import DitoptWarning
from ditopt.report import Decision
from ditopt.runtime.doubts import Doubt


class Notices:
    """Decisions and warnings of one model's step cache.

    Args:
        model: name for messages.
    """

    def __init__(self, model: str) -> None:
        self.decisions: list[Decision] = []
        self._model = model
        self._told: set[Doubt] = set()

    def off_plan(self, what: str) -> None:
        """The loop is not the one that was planned for."""
        self._tell(
            Doubt.TIMESTEP_MISMATCH,
            f"{what}: this sampling run computes every step in full",
            "Profile and plan with the sampler and the number of steps that you use.",
        )

    def inference_tensors(self) -> None:
        """Nothing identifies a run, because in-place changes of its inputs would not show."""
        self._tell(
            Doubt.INFERENCE_TENSORS,
            "the inputs are inference tensors, which do not show in-place changes, so calls of one "
            "sampling run cannot be recognised: no step is skipped",
            "Run the sampling loop inside `with ditopt.session():` or under torch.no_grad().",
        )

    def strangers(self, capacity: int) -> None:
        """Call after call looks like the first of a new run."""
        self._tell(
            Doubt.JOINED_LATE,
            "the calls of a sampling run are not recognised as one, because its prompt or position "
            f"tensors are new at each call, or because more than {capacity} runs take turns: no "
            "step is skipped",
            "Build these tensors once before the loop, or run it in `with ditopt.session():`.",
        )

    def _tell(self, topic: Doubt, message: str, remedy: str) -> None:
        if topic in self._told:
            return
        self._told.add(topic)
        self.decisions.append(Decision("model", "step_cache", False, message))
        warnings.warn(f"{self._model}: {message}. {remedy}", DitoptWarning, stacklevel=2)

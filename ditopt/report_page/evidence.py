"""What a report is made of: the files of a profile folder and, if there is one, the plan."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
from safetensors import SafetensorError

from ditopt.errors import PlanError, ProfileError
from ditopt.plan import Plan
from ditopt.profiling.analysis import Analysis
from ditopt.profiling.linears import LinearProfile
from ditopt.profiling.schema import Profile, SeedRecord, load_complete
from ditopt.search.record import SearchRecord

if TYPE_CHECKING:
    from torch import Tensor

MAX_TENSOR_BYTES = 4 << 30
"""Largest tensor file that is read."""


@dataclass(frozen=True)
class Evidence:
    """A finished profile and what was made of it.

    Attributes:
        folder: where the profile lies.
        profile: sites, options, costs.
        records: errors of the options, one for each seed.
        plan: what was decided; None for a report on the profile alone.
        plan_path: its file.
        analysis: classes and stability of heads; None where it was not written.
        search: trials and frontier; None where no search was recorded.
        linears: number formats; None where they were not profiled.
    """

    folder: Path
    profile: Profile
    records: list[SeedRecord]
    plan: Plan | None
    plan_path: Path | None
    analysis: Analysis | None
    search: SearchRecord | None
    linears: LinearProfile | None

    @property
    def about_this_plan(self) -> bool:
        """Whether the recorded search ended in this very plan."""
        if self.plan_path is None or self.search is None:
            return False
        text = self.plan_path.read_bytes()
        return hashlib.sha256(text).hexdigest() == self.search.plan_sha256

    @classmethod
    def load(cls, folder: Path, plan_path: Path | None) -> Evidence:
        """Read everything that is there.

        Raises:
            ProfileError: no profile, half of one, or a damaged file.
            PlanError: malformed, or of another model than the profile's.
        """
        profile, records = load_complete(folder)
        plan = None if plan_path is None else Plan.load(plan_path)
        if plan is not None and plan.model.architecture != profile.model.architecture:
            raise PlanError(
                f"the plan is for {plan.model.name}, the profile of {profile.model.name}: "
                "their architectures differ",
                remedy="Name the folder that the plan was made from.",
            )
        return cls(
            folder=folder,
            profile=profile,
            records=records,
            plan=plan,
            plan_path=plan_path,
            analysis=Analysis.load(folder),
            search=SearchRecord.load(folder),
            linears=LinearProfile.load(folder),
        )


def tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, or None where there is none.

    Raises:
        ProfileError: damaged, or unreasonably large.
    """
    if not path.is_file():
        return None
    remedy = f"Delete {path.name} and run the command that wrote it again."
    if path.stat().st_size > MAX_TENSOR_BYTES:
        raise ProfileError(f"{path.name} is larger than {MAX_TENSOR_BYTES} bytes", remedy=remedy)
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"{path.name} is damaged: {error}", remedy=remedy) from error

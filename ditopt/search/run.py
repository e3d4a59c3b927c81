"""`plan_from_profile`: from a finished profile and a goal to a verified plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ditopt.errors import ProfileError
from ditopt.plan import Goal, Plan
from ditopt.profiling.linears import LinearProfile, load_statistics
from ditopt.profiling.schema import Profile, load_complete
from ditopt.progress import Progress, silent
from ditopt.search.calibration import ErrorModel
from ditopt.search.closed_loop import ClosedLoop, LoopSpec
from ditopt.search.linears import LinearChoices
from ditopt.search.prediction import Predictor
from ditopt.search.verify import SamplingVerifier, Verify
from ditopt.workload import Workload, load_workload

if TYPE_CHECKING:
    from ditopt.search.tuning import SampleSchedule

_ATTENTION_GAIN_DB = 10.0
"""Where predictions start from: guidance and later calls amplify errors of early ones. Measured on
the embedded video model (guidance 2); sampling corrects it."""

_DEFAULT_RANGE = 2.0
"""Value range that predictions start from where the workload states none; sampling corrects it."""


def plan_from_profile(
    profile_dir: str | os.PathLike[str],
    goal: Goal,
    out: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
    workload: Workload | None = None,
    *,
    verify: Verify | None = None,
    spec: LoopSpec | None = None,
) -> Plan:
    """Search the fastest plan that meets a quality, or the most exact one that meets a speed.

    Args:
        profile_dir: what `profile` wrote, finished.
        goal: what to meet.
        out: plan file to write; nothing is written when the search fails.
        progress: told after each measurement.
        workload: what was profiled; loaded from where the profile says if None.
        verify: samples a plan; by default the workload's own loop under `torch.compile`.
        spec: how much sampling is allowed.

    Raises:
        ProfileError: no profile, half of one, or one of another model.
        GoalUnattainable: nothing meets the goal; says the best attainable.
    """
    folder = Path(profile_dir)
    profile, records = load_complete(folder)
    sample_schedule: SampleSchedule | None = None
    if verify is None:
        verify = SamplingVerifier(workload or _load(profile), profile, folder)
        sample_schedule = verify.schedule_psnr_db
    linears = LinearProfile.load(folder)
    choices = LinearChoices(linears, load_statistics(folder)) if linears is not None else None
    predictor = Predictor(profile, records, choices)
    data_range = profile.data_range or _DEFAULT_RANGE
    model = ErrorModel(data_range, attention_gain_db=_ATTENTION_GAIN_DB)
    loop = ClosedLoop(predictor, model, goal, verify, progress, spec or LoopSpec(), sample_schedule)
    plan = loop.run()
    notes = loop.tuner.notes if loop.tuner is not None else ()
    left_out = linears.notes if linears is not None else ()
    assumptions = (*_assumptions(profile, predictor, goal), *notes, *left_out)
    plan = plan.model_copy(update={"assumptions": assumptions})
    if out is not None:
        plan.save(out)
    return plan


def search(
    profile_dir: str | os.PathLike[str],
    *,
    min_psnr_db: float | None = None,
    target_speedup: float | None = None,
    out: str | os.PathLike[str] | None = None,
    workload: Workload | None = None,
    progress: Progress = silent,
) -> Plan:
    """`plan_from_profile` with the goal in words: exactly one of the two numbers."""
    goal = Goal(min_psnr_db=min_psnr_db, target_speedup=target_speedup)
    return plan_from_profile(profile_dir, goal, out, progress, workload)


def _load(profile: Profile) -> Workload:
    if profile.source is None:
        raise ProfileError(
            "the profile does not say where its workload is defined, so plans cannot be sampled",
            remedy="Pass workload= to the search, or profile through `ditopt profile FILE`.",
        )
    return load_workload(profile.source)


def _assumptions(profile: Profile, predictor: Predictor, goal: Goal) -> tuple[str, ...]:
    lines = [
        f"calls 0 to {predictor.dense_calls - 1} keep dense attention",
        "all guidance branches share one plan",
    ]
    if goal.target_speedup is not None:
        lines.append("the dense time is the profile's, measured on the same machine")
    return (*lines, *profile.notes)

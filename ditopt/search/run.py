"""`plan_from_profile`: from a finished profile and a goal to a verified plan."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ditopt.errors import ConfigError, ProfileError, did_you_mean
from ditopt.plan import Goal, Plan
from ditopt.profiling.linears import LinearProfile, load_statistics
from ditopt.profiling.schema import Profile, SeedRecord, load_complete
from ditopt.progress import Progress, silent
from ditopt.search.calibration import Energies, ErrorModel
from ditopt.search.closed_loop import ClosedLoop, LoopSpec
from ditopt.search.linears import LinearChoices
from ditopt.search.pareto import frontier
from ditopt.search.prediction import Predictor
from ditopt.search.record import SearchRecord
from ditopt.search.sensitivity import TECHNIQUES, Technique
from ditopt.search.verify import SamplingVerifier, Verify, save_results
from ditopt.workload import Workload, load_workload

if TYPE_CHECKING:
    from ditopt.search.tuning import SampleSchedule

_GAINS_DB = Energies(attention=-1.7, linears=0.0, cache=-5.5)
"""Where predictions start from: how much of a deviation, grown as `trajectory` says, arrives at the
result. Measured on the embedded video model (guidance 2); sampling corrects it."""

_DEFAULT_RANGE = 2.0
"""Value range that predictions start from where the workload states none; sampling corrects it."""


@dataclass(frozen=True)
class SearchOptions:
    """What the search may use.

    Attributes:
        techniques: the others leave the model as it is.
        max_programs: bound on the number of different block programs, which are compiled one by
            one; a model with more kinds of blocks gets one program for each.
        loop: how much sampling is allowed.
    """

    techniques: tuple[Technique, ...] = TECHNIQUES
    max_programs: int = 4
    loop: LoopSpec = field(default_factory=LoopSpec)

    @classmethod
    def parse(cls, techniques: str, *, max_programs: int, loop: LoopSpec) -> SearchOptions:
        """With techniques as a comma list.

        Raises:
            ConfigError: there is no such technique, or none is named.
        """
        names = [name.strip() for name in techniques.split(",") if name.strip()]
        for name in names or [techniques]:
            if name not in TECHNIQUES:
                raise ConfigError(
                    f"techniques: {name!r} is none of {', '.join(TECHNIQUES)}",
                    remedy=did_you_mean(name, TECHNIQUES),
                )
        chosen = tuple(technique for technique in TECHNIQUES if technique in names)
        return cls(chosen, max_programs, loop)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        plan: the adopted one.
        record: everything that was predicted and sampled.
    """

    plan: Plan
    record: SearchRecord


def plan_from_profile(
    profile_dir: str | os.PathLike[str],
    goal: Goal,
    out: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
    workload: Workload | None = None,
    *,
    verify: Verify | None = None,
    options: SearchOptions | None = None,
) -> Plan:
    """`find_plan`, the plan alone."""
    found = find_plan(profile_dir, goal, out, progress, workload, verify=verify, options=options)
    return found.plan


def find_plan(
    profile_dir: str | os.PathLike[str],
    goal: Goal,
    out: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
    workload: Workload | None = None,
    *,
    verify: Verify | None = None,
    options: SearchOptions | None = None,
) -> Found:
    """Search the fastest plan that keeps a quality, or the most exact one within other limits.

    Beside the profile it leaves search.json, `dense_N.safetensors` (results of the model as it is)
    and `optimized_N.safetensors` (results of the plan on audit seeds).

    Args:
        profile_dir: what `profile` wrote, finished.
        goal: what to meet.
        out: plan file to write; nothing is written when the search fails.
        progress: told after each measurement.
        workload: what was profiled; loaded from where the profile says if None.
        verify: samples a plan; by default the workload's own loop under `torch.compile`.
        options: what the search may use.

    Raises:
        ProfileError: no profile, half of one, or one of another model.
        GoalUnattainable: nothing meets the goal; says the best attainable.
    """
    folder, options = Path(profile_dir), options or SearchOptions()
    profile, records = load_complete(folder)
    sample_schedule: SampleSchedule | None = None
    if verify is None:
        verify = SamplingVerifier(workload or _load(profile), profile, folder)
        sample_schedule = verify.schedule_psnr_db
    predictor, left_out = predictor_of(folder, profile, records, options)
    model = starting_model(profile.data_range)
    loop = ClosedLoop(predictor, model, goal, verify, progress, options.loop, sample_schedule)
    try:
        plan = loop.run()
    finally:
        trials = loop.trials
        points = frontier(predictor, loop.model)
        SearchRecord(goal=str(goal), trials=trials, frontier=points).save(folder)
    notes = loop.tuner.notes if loop.tuner is not None else ()
    assumptions = (*_assumptions(profile, predictor, plan, goal), *notes, *left_out)
    plan = plan.model_copy(update={"assumptions": assumptions})
    text = plan.to_text().encode()
    if out is not None:
        plan.save(out)
        text = Path(out).read_bytes()  # a side file's hash is added when it is written
    sha256 = hashlib.sha256(text).hexdigest()
    record = SearchRecord(goal=str(goal), trials=trials, frontier=points, plan_sha256=sha256)
    record.save(folder)
    save_results(folder, loop.results)
    return Found(plan, record)


def starting_model(data_range: float | None) -> ErrorModel:
    """What turns predicted errors into PSNR before anything has been sampled."""
    return ErrorModel(data_range or _DEFAULT_RANGE, _GAINS_DB)


def predictor_of(
    folder: Path, profile: Profile, records: Sequence[SeedRecord], options: SearchOptions
) -> tuple[Predictor, tuple[str, ...]]:
    """What the profile folder lets the search predict, and notes on what it does not.

    Raises:
        ProfileError: the profile of the linear layers is of another model.
    """
    found = LinearProfile.load(folder)
    linears = None
    if found is not None:
        if found.weights != profile.model.weights:
            raise ProfileError(
                "linears.json is of another model than profile.json: weights differs",
                remedy="Profile again with --linears.",
            )
        known = [getattr(torch, shape.dtype) for shape in profile.shapes.values()]
        dtype = known[0] if known else torch.float32
        linears = LinearChoices(found, load_statistics(folder), records, dtype)
    predictor = Predictor(profile, records, linears, options.techniques, options.max_programs)
    return predictor, found.notes if found is not None else ()


def search(
    profile_dir: str | os.PathLike[str],
    *,
    min_psnr_db: float | None = None,
    min_ssim: float | None = None,
    target_speedup: float | None = None,
    max_memory_bytes: int | None = None,
    out: str | os.PathLike[str] | None = None,
    workload: Workload | None = None,
    progress: Progress = silent,
    options: SearchOptions | None = None,
) -> Plan:
    """`plan_from_profile` with the goal in words: at least one of the four numbers."""
    goal = Goal(
        min_psnr_db=min_psnr_db,
        min_ssim=min_ssim,
        target_speedup=target_speedup,
        max_memory_bytes=max_memory_bytes,
    )
    return plan_from_profile(profile_dir, goal, out, progress, workload, options=options)


def _load(profile: Profile) -> Workload:
    if profile.source is None:
        raise ProfileError(
            "the profile does not say where its workload is defined, so plans cannot be sampled",
            remedy="Pass workload= to the search, or profile through `ditopt profile FILE`.",
        )
    return load_workload(profile.source)


def _assumptions(profile: Profile, predictor: Predictor, plan: Plan, goal: Goal) -> tuple[str, ...]:
    lines = ["all guidance branches share one plan"]
    start = plan.phases[-1].calls[0]
    if start:
        lines.insert(0, f"calls 0 to {start - 1} keep dense attention")
    if goal.target_speedup is not None:
        lines.append("the dense time is the profile's, measured on the same machine")
    if profile.costs is not None and profile.costs.source == "roofline":
        lines.append("times were computed from peak rates of the device, not measured")
    if goal.max_memory_bytes is not None:
        lines.append(
            "memory counts weights, with the option release_weights, and stored residuals; "
            "activations are not counted"
        )
    return (*lines, *profile.notes)

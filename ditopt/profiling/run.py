"""`profile`: measure a workload into a folder, seed by seed, so that nothing finished is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ditopt import files, fingerprint
from ditopt.environment import device_name
from ditopt.errors import ProfileError
from ditopt.plan import (
    Block,
    Hardware,
    ModelRecord,
    Sampler,
)
from ditopt.profiling.analysis import analyse_folder
from ditopt.profiling.arithmetics import NOT_OFFERED, what_is_left_out
from ditopt.profiling.cost import measure_costs
from ditopt.profiling.loops import (
    Observe,
    layout_of,
    observed_loop,
    only_model,
    plain_loop,
    sampler_of,
)
from ditopt.profiling.map_record import has_maps
from ditopt.profiling.observer import ProfileObserver
from ditopt.profiling.roofline import hardware_of, roofline_costs
from ditopt.profiling.schema import PROFILE_NAME, Costs, Profile, has_seed
from ditopt.progress import Progress, silent
from ditopt.timing import timed
from ditopt.workload import Workload

MeasureCosts = Callable[[Workload, Profile, Progress], Costs]


class ProfileSpec(BaseModel):
    """How thoroughly to profile.

    Attributes:
        observed_calls: number of calls, spread over the loop, at which candidates are measured.
        block: block sizes; null: 64 x 64 on the CPU, 128 x 128 on an accelerator.
        memory_bytes: memory beyond the model's own, for tiles of attention and for residuals of
            the block stack, which are sketched where they need more.
        first_seed: seeds count from here: profiles of different seeds can be merged.
        for_device: name of a device that is not present, for costs by `roofline`; null: costs are
            measured here.
        measure_again: time attention even where this machine has done so before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    observed_calls: int = Field(5, ge=1)
    block: Block | None = None
    memory_bytes: int = Field(1 << 30, ge=1 << 20)
    first_seed: int = Field(0, ge=0)
    for_device: str | None = None
    measure_again: bool = False


def profile(
    workload: Workload,
    out: str | os.PathLike[str],
    seeds: int = 2,
    progress: Progress = silent,
    spec: ProfileSpec | None = None,
    *,
    source: str | None = None,
    observe: Observe | None = None,
    measure: MeasureCosts | None = None,
) -> Profile:
    """Measure one workload into a folder; interrupted runs resume, finished seeds are kept.

    Args:
        workload: a model and its denoising loop.
        out: folder for profile.json and the tensors of each seed.
        seeds: how many; they are `spec.first_seed` and those that follow.
        progress: told what happens, first how long it will take and how much memory it needs.
        spec: how thoroughly.
        source: how `load_workload` finds the workload again, for a search in another process.
        observe: shows the canonical graph to an observer; `ditopt.observe.observe` by default.
        measure: measures the costs once all seeds are recorded; `measure_costs` by default.

    Raises:
        ProfileError: no seed, several denoisers, an unknown device, a value that is not finite
            (names the call and the site), or a folder with the profile of something else (names
            what differs).
        FileError: the operating system refuses to write; nothing is overwritten.
    """
    if seeds < 1:
        raise ProfileError(f"seeds: expected at least 1, got {seeds}")
    spec = spec or ProfileSpec()
    model, folder = only_model(workload), Path(out)
    here = describe_hardware(next(model.parameters()).device)
    hardware = here if spec.for_device is None else hardware_of(spec.for_device)
    numbers = range(spec.first_seed, spec.first_seed + seeds)
    existing = _existing(folder)
    (trace, inputs), loop_ms = timed(lambda: plain_loop(workload))
    block = spec.block or _default_block(model)
    observer = ProfileObserver(
        layout_of(workload, inputs),
        block,
        trace.calls_per_branch,
        _spread(trace.calls_per_branch, spec.observed_calls),
        trace.branches,
        spec.memory_bytes,
    )
    facts = (workload, model, sampler_of(trace), hardware, tuple(numbers), source)
    draft = _describe(observer, *facts)
    if existing is not None:
        _refuse_other(existing, draft)
    _announce(progress, len(observer.observed_calls) / trace.calls_per_branch, seeds, loop_ms, spec)
    finished = [
        n
        for n in (existing.finished if existing else ())
        if has_seed(folder, n) and has_maps(folder, n)
    ]
    # Once for all seeds: Dynamo compiles a function a few times only, then runs it unobserved.
    observed = (observe or _observe)(model, observer)
    for done, seed in enumerate(numbers):
        if seed not in finished:
            record = observed_loop(workload, seed, trace, observer, observed)
            for field in ("options", "arithmetics") if existing is not None else ():
                if getattr(existing, field) != getattr(observer, field):
                    raise _of_something_else(field)  # of another version of ditopt
            observer.maps().save(folder, seed)
            record.save(folder, seed)  # last: a seed with its record is finished
            finished.append(seed)
            existing = _describe(observer, *facts)
            existing = existing.model_copy(update={"finished": tuple(sorted(finished))})
            existing.save(folder)
        progress("profile", done + 1, seeds + 1)
    assert existing is not None
    update: dict[str, Any] = {
        "source": source,
        "seeds": draft.seeds,
        "hardware": hardware,
        "costs": existing.costs,
    }
    if existing.costs is None or existing.hardware != hardware:
        before = _of_roofline(existing.hardware.name)
        notes = [n for n in existing.notes if n != before and not n.startswith(NOT_OFFERED)]
        of_roofline = []
        if spec.for_device is not None:
            update["costs"] = roofline_costs(model, inputs, existing, spec.for_device)
            of_roofline = [_of_roofline(spec.for_device)]
        else:
            measure = measure or partial(measure_costs, again=spec.measure_again)
            update["costs"] = measure(workload, existing, progress)
        device = next(model.parameters()).device
        notes += what_is_left_out(update["costs"], block, device)
        update["notes"] = (*notes, *of_roofline)
    finished_profile = existing.model_copy(update=update)
    finished_profile.save(folder)
    analyse_folder(folder)
    progress("profile", seeds + 1, seeds + 1)
    return finished_profile


def describe_hardware(device: torch.device) -> Hardware:
    """The device that a model runs on, as recorded in profiles and plans."""
    return Hardware(
        device=device.type,
        name=device_name(device),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )


def _default_block(model: nn.Module) -> Block:
    # FlexAttention wants query blocks of 128 on CUDA; smaller ones follow patterns more closely.
    size = 64 if next(model.parameters()).device.type == "cpu" else 128
    return Block(q=size, k=size)


def _observe(model: nn.Module, observer: ProfileObserver) -> Callable[..., Any]:
    from ditopt.observe import observe  # the compiler stack loads only when it is used

    return observe(model, observer)


def _spread(calls: int, count: int) -> list[int]:
    """`count` call indices, the first and the last among them."""
    positions = torch.linspace(0, calls - 1, min(count, calls), dtype=torch.float64)
    return [int(position) for position in positions.round()]


def _existing(folder: Path) -> Profile | None:
    files.make_folder(folder)
    return Profile.load(folder) if (folder / PROFILE_NAME).exists() else None


def _describe(
    observer: ProfileObserver,
    workload: Workload,
    model: nn.Module,
    sampler: Sampler,
    hardware: Hardware,
    seeds: tuple[int, ...],
    source: str | None,
) -> Profile:
    """What is known so far; sites and options are met in the first observed loop."""
    return Profile(
        model=ModelRecord(
            architecture=fingerprint.architecture(model),
            weights=fingerprint.weights(model),
            name=type(model).__name__,
            sites=tuple(observer.sites.values()),
        ),
        sampler=sampler,
        hardware=hardware,
        layout=observer.layout,
        block=observer.block,
        options=observer.options,
        orders=observer.choices.orders,
        selectors=observer.selectors,
        arithmetics=observer.arithmetics,
        shapes=observer.shapes,
        observed_calls=observer.observed_calls,
        data_range=workload.data_range,
        seeds=seeds,
        source=source,
        weight_bytes=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        residual_bytes=observer.residual_bytes,
        notes=tuple(_notes(observer.left_dense)),
    )


def _notes(left_dense: Mapping[str, str]) -> Iterator[str]:
    """One line for each reason, with the first site that it holds for."""
    for reason in dict.fromkeys(left_dense.values()):
        sites = [site for site, why in left_dense.items() if why == reason]
        more = f" and {len(sites) - 1} more sites" if len(sites) > 1 else ""
        yield f"{sites[0]}{more}: dense attention, {reason}"


def _refuse_other(existing: Profile, draft: Profile) -> None:
    """Resume only what is the same; sites and options follow from what is compared."""
    names = ["sampler", "block", "observed_calls", "data_range"]
    if draft.layout is not None:  # else it is inferred in the observed loop
        names.append("layout")
    pairs: Mapping[str, tuple[object, object]] = {
        "model.architecture": (existing.model.architecture, draft.model.architecture),
        "model.weights": (existing.model.weights, draft.model.weights),
        **{name: (getattr(existing, name), getattr(draft, name)) for name in names},
    }
    for field, (before, now) in pairs.items():
        if before != now:
            raise _of_something_else(field)


def _of_something_else(field: str) -> ProfileError:
    return ProfileError(
        f"the folder holds the profile of something else: {field} differs",
        remedy="Profile into another folder, or delete this one.",
    )


def _of_roofline(device: str) -> str:
    return f"costs are what the peak rates of {device} allow, not measured; measure on the device"


def _announce(
    progress: Progress, observed: float, seeds: int, loop_ms: float, spec: ProfileSpec
) -> None:
    """Time and memory, from the plain loop and the share of calls that are observed.

    Measured on the embedded model: a loop under observation takes 1.2 plain ones and, where every
    call is measured, 3.7 more; costs take about one loop, and compilation a minute.
    """
    seconds = loop_ms / 1e3 * (seeds * (1.2 + 3.7 * observed) + 1) + 60
    memory = spec.memory_bytes / (1 << 20)
    progress(f"profile: about {seconds:.0f} s, up to {memory:.0f} MiB of memory", 0, seeds + 1)

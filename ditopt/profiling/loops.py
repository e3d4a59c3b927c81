"""The sampling loops that a profile runs: one as it is, then one observed loop per seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ditopt.calls import CallRecorder, CallTrace, name_inputs
from ditopt.errors import ProfileError
from ditopt.plan import Sampler
from ditopt.profiling.latents import StepEnergy
from ditopt.profiling.observer import ProfileObserver

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout
    from ditopt.profiling.schema import SeedRecord
    from ditopt.workload import Denoiser, Workload

Observe = Callable[[nn.Module, ProfileObserver], Callable[..., Any]]
"""Makes a callable like the model that shows the observer what it computes."""


def only_model(workload: Workload) -> nn.Module:
    """The workload's denoiser.

    Raises:
        ProfileError: there are several.
    """
    models = workload.models
    if len(models) > 1:
        raise ProfileError(
            f"the workload has {len(models)} denoisers ({', '.join(models)}), a profile is of one",
            remedy="Profile each of `workload.parts()`; on the command line, WORKLOAD@NAME.",
        )
    return next(iter(models.values()))


def plain_loop(workload: Workload) -> tuple[CallTrace, dict[str, Any]]:
    """Run seed 0 as it is: the trace of its calls, and the inputs of the first call by name."""
    model = only_model(workload)
    first: dict[str, Any] = {}

    def denoiser(*args: Any, **kwargs: Any) -> Any:
        if not first:
            first.update(name_inputs(model, args, kwargs))
        return model(*args, **kwargs)

    recorder = CallRecorder(model)
    with recorder.recording():
        workload.run(0, _stand_ins(workload, denoiser))
    return recorder.trace(), first


def observed_loop(
    workload: Workload,
    seed: int,
    trace: CallTrace,
    observer: ProfileObserver,
    observed: Denoiser,
) -> SeedRecord:
    """Run one seed under observation; its calls must be those of `trace`.

    Args:
        workload: what to run.
        seed: of the loop.
        trace: the calls of seed 0.
        observer: is told which call comes next.
        observed: stands for the model and shows what it computes to `observer`.
    """
    model = only_model(workload)
    energy = StepEnergy(trace)
    calls = iter(trace.calls)

    def denoiser(*args: Any, **kwargs: Any) -> Any:
        call = next(calls, None)
        if call is None:
            raise _other_number(seed, "more than", trace)
        observer.begin_call(call.index, call.branch)
        energy.add(call, name_inputs(model, args, kwargs))
        return observed(*args, **kwargs)

    observer.begin_seed()
    workload.run(seed, _stand_ins(workload, denoiser))
    if next(calls, None) is not None:
        raise _other_number(seed, "fewer than", trace)
    return observer.finish_seed(energy.finish())


def sampler_of(trace: CallTrace) -> Sampler:
    """The loop's facts as plans record them."""
    return Sampler(
        calls=trace.calls_per_branch,
        branches=trace.branches,
        timestep=trace.timestep,
        timesteps=trace.timesteps,
        varying=trace.varying,
    )


def layout_of(workload: Workload, inputs: Mapping[str, Any]) -> TokenLayout | None:
    """The token grid that the workload states for a call, if it states one."""
    return workload.layout(inputs) if callable(workload.layout) else workload.layout


def _stand_ins(workload: Workload, denoiser: Denoiser) -> dict[str, Denoiser]:
    return dict.fromkeys(workload.models, denoiser)


def _other_number(seed: int, relation: str, trace: CallTrace) -> ProfileError:
    return ProfileError(
        f"seed {seed} makes {relation} the {len(trace.calls)} calls of seed 0",
        remedy="ditopt needs a loop with the same number of calls for every seed.",
    )

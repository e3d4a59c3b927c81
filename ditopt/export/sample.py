"""A workload's sampling loop around an engine: one picture, or one more row in a bench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditopt.bench import Variant, default_variants
from ditopt.errors import EngineError, WorkloadError
from ditopt.export.engine import Engine
from ditopt.pictures import check_kind, write_frames
from ditopt.plan import Plan
from ditopt.progress import Progress, silent
from ditopt.timing import timed

if TYPE_CHECKING:
    from torch import nn

    from ditopt.workload import Workload


def load_for(
    workload: Workload, path: Path, expect_sha256: str | None = None
) -> tuple[Engine, Callable[[nn.Module], Any]]:
    """An engine, and a function that gives it for the denoiser it was made from.

    Other denoisers stay as they are.

    Raises:
        EngineError: the engine cannot be loaded, or belongs to none of the workload's models.
    """
    engine = Engine.load(path, expect_sha256)
    mine = [id(module) for module in workload.models.values() if engine.stand_for(module)]
    if not mine:
        names = ", ".join(type(module).__name__ for module in workload.models.values())
        raise EngineError(
            f"architecture: the engine was made from {engine.manifest.name} of another "
            f"architecture than the workload's {names}",
            remedy="Export an engine from this workload.",
        )
    return engine, lambda module: engine if id(module) in mine else module


def sample_to_file(
    workload: Workload,
    engine: Path | None,
    out: Path,
    *,
    seed: int,
    expect_sha256: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run the loop once and draw the result.

    Args:
        workload: gives the loop, and `frames`, which turns its result into pictures.
        engine: folder of an engine, or None for the model itself.
        out: png, gif or mp4.
        seed: of the loop.
        expect_sha256: of the engine's manifest.
        progress: told after each call of the denoisers; how many there will be is known with an
            engine that has a plan.

    Returns:
        Time of the loop, seed, number of frames, and what was written, as plain JSON values.

    Raises:
        WorkloadError: the workload says nothing about pictures, or another kind of file.
        BackendUnavailable: the kind of file needs a package that is not installed.
    """
    check_kind(out)
    if workload.frames is None:
        raise WorkloadError(
            "Workload.frames is not set, so its result cannot be drawn",
            remedy="Give the workload a function that makes uint8 [F, H, W, 3] of a result.",
        )
    models: dict[str, Any] = dict(workload.models)
    total = 0
    if engine is not None:
        loaded, stand_in = load_for(workload, engine, expect_sha256)
        models = {name: stand_in(module) for name, module in models.items()}
        if loaded.plan is not None and len(models) == 1:
            total = loaded.plan.sampler.calls * loaded.plan.sampler.branches
    told = _Told(progress, total)
    models = {name: told.of(model) for name, model in models.items()}
    result, ms = timed(lambda: workload.run(seed, models))
    frames = workload.frames(result)
    write_frames(out, frames)
    return {"seed": seed, "ms": ms, "frames": len(frames), "out": str(out)}


class _Told:
    """Denoisers that report their calls."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        progress("sampling", 0, total)

    def of(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The same model, reporting."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = model(*args, **kwargs)
            self._done += 1
            self._progress("sampling", self._done, self._total)
            return result

        return call


def bench_variants(
    workload: Workload, plan: Path | None, engine: Path, expect_sha256: str | None = None
) -> tuple[dict[str, Variant], Plan | None]:
    """The usual variants of a bench and `engine`, and the plan of the engine."""
    chosen = None if plan is None else Plan.load(plan)
    loaded, stand_in = load_for(workload, engine, expect_sha256)
    return {**default_variants(chosen), "engine": stand_in}, loaded.plan

"""A workload's sampling loop around an engine: one picture, or one more row in a bench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditopt.bench import Variant, default_variants
from ditopt.errors import EngineError, WorkloadError
from ditopt.export.engine import Engine
from ditopt.pictures import write_frames
from ditopt.plan import Plan
from ditopt.timing import timed

if TYPE_CHECKING:
    from torch import nn

    from ditopt.workload import Workload


def load_for(
    workload: Workload, path: Path, expect_sha256: str | None = None
) -> Callable[[nn.Module], Any]:
    """A function that gives the engine for the denoiser it was made from, and others as they are.

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
    return lambda module: engine if id(module) in mine else module


def sample_to_file(
    workload: Workload,
    engine: Path | None,
    out: Path,
    *,
    seed: int,
    expect_sha256: str | None = None,
) -> dict[str, Any]:
    """Run the loop once and draw the result.

    Args:
        workload: gives the loop, and `frames`, which turns its result into pictures.
        engine: folder of an engine, or None for the model itself.
        out: png or gif.
        seed: of the loop.
        expect_sha256: of the engine's manifest.

    Returns:
        Time of the loop, seed, number of frames, and what was written, as plain JSON values.

    Raises:
        WorkloadError: the workload says nothing about pictures.
    """
    if workload.frames is None:
        raise WorkloadError(
            "Workload.frames is not set, so its result cannot be drawn",
            remedy="Give the workload a function that makes uint8 [F, H, W, 3] of a result.",
        )
    models: dict[str, Any] = dict(workload.models)
    if engine is not None:
        stand_in = load_for(workload, engine, expect_sha256)
        models = {name: stand_in(module) for name, module in models.items()}
    result, ms = timed(lambda: workload.run(seed, models))
    frames = workload.frames(result)
    write_frames(out, frames)
    return {"seed": seed, "ms": ms, "frames": len(frames), "out": str(out)}


def bench_variants(
    workload: Workload, plan: Path | None, engine: Path, expect_sha256: str | None = None
) -> dict[str, Variant]:
    """The usual variants of a bench, and `engine`."""
    loaded = None if plan is None else Plan.load(plan)
    return {**default_variants(loaded), "engine": load_for(workload, engine, expect_sha256)}

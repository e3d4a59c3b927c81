"""`ditopt demo`: the whole way from a trained model to a measured plan, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ditopt
from ditopt.bench import bench
from ditopt.errors import WorkloadError
from ditopt.files import make_folder
from ditopt.pictures import Frames, write_comparison
from ditopt.plan import Goal
from ditopt.profiling import ProfileSpec, profile
from ditopt.search import plan_from_profile
from ditopt.workload import load_workload

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.bench_result import BenchResult
    from ditopt.progress import Progress

_CAPTIONS = {"eager": "dense (eager)", "ditopt+plan": "ditopt with the plan"}


def demo_workload() -> str:
    """The embedded model's workload, by file.

    Raises:
        WorkloadError: ditopt was installed without its examples.
    """
    path = Path(ditopt.__file__).parents[1] / "examples" / "tiny_video" / "workload.py"
    if not path.is_file():
        raise WorkloadError(
            "the demo's model is not part of the installed package",
            remedy="Clone the repository and run `make demo` in it.",
        )
    return str(path)


def run_demo(out: Path, min_psnr_db: float, progress: Progress) -> tuple[BenchResult, Path]:
    """Profile, plan and bench the embedded model.

    Args:
        out: folder for the profile (an earlier one is taken up again), the plan and the picture.
        min_psnr_db: the plan's goal.
        progress: told about every stage.

    Returns:
        The bench, on the plan's audit seeds, and the picture of its first seed.
    """
    workload = load_workload(demo_workload())
    make_folder(out)
    brief = ProfileSpec(observed_calls=3)  # the demo's model is small and its heads are steady
    profile(workload, out / "profile", progress=progress, spec=brief, source=workload.origin)
    plan_path, picture = out / "plan.yaml", out / "dense_beside_optimized.png"
    goal = Goal(min_psnr_db=min_psnr_db)
    plan = plan_from_profile(out / "profile", goal, plan_path, progress, workload)

    shown: dict[str, Frames] = {}

    def keep_first(variant: str, seed: int, result: Tensor) -> None:
        caption = _CAPTIONS.get(variant)
        if caption is not None and caption not in shown and workload.frames is not None:
            shown[caption] = workload.frames(result)

    measured = bench(workload, plan, observe=keep_first, progress=progress)
    write_comparison(picture, {caption: shown[caption] for caption in _CAPTIONS.values()})
    return measured, picture

"""`ditopt demo`: the whole way from a trained model to a measured plan, in one command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ditopt
from ditopt.bench import bench
from ditopt.errors import WorkloadError
from ditopt.files import make_folder
from ditopt.pictures import Frames, write_comparison
from ditopt.plan import Goal
from ditopt.profiling import ProfileSpec, profile
from ditopt.report_page import write_report
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


@dataclass(frozen=True)
class Demo:
    """What the demo measured, and what it wrote to be looked at.

    Attributes:
        bench: on the plan's audit seeds.
        plan: the plan's file.
        picture: frames of the first seed.
        report: the page about profile, plan and search.
    """

    bench: BenchResult
    plan: Path
    picture: Path
    report: Path


def run_demo(out: Path, min_psnr_db: float, progress: Progress) -> Demo:
    """Profile, plan and bench the embedded model.

    Args:
        out: folder for the profile (an earlier one is taken up again), the plan, the picture and
            the report.
        min_psnr_db: the plan's goal.
        progress: told about every stage.
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
    report = out / "report.html"
    write_report(out / "profile", report, plan_path, workload=workload, progress=progress)
    return Demo(measured, plan_path, picture, report)

"""`write_report`: gather what is there, say what is not, write one page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditopt.errors import DitoptError, ProfileError, WorkloadError
from ditopt.files import write_text
from ditopt.progress import Progress, silent
from ditopt.report_page.evidence import Evidence, tensors
from ditopt.report_page.page import Missing, render
from ditopt.report_page.pictures import Sheets, sheets
from ditopt.workload import Workload, load_workload

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.pictures import Frames
    from ditopt.report import Decision


@dataclass(frozen=True)
class WrittenReport:
    """What `write_report` wrote.

    Attributes:
        path: the page.
        size: its bytes.
        title: its first line.
        lead: the sentence below.
        sections: for each section "shown", or why it is empty.
    """

    path: Path
    size: int
    title: str
    lead: str
    sections: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": str(self.path),
            "bytes": self.size,
            "title": self.title,
            "lead": self.lead,
            "sections": self.sections,
        }

    def text(self) -> str:
        """For the terminal: the sentence, and what the page could not show."""
        empty = [f"  {name}: {why}" for name, why in self.sections.items() if why != "shown"]
        lines = [f"{self.title}. {self.lead}", *(["Not in the page:", *empty] if empty else [])]
        return "\n".join([*lines, f"Report written to {self.path} ({self.size / 1024:.0f} KiB)."])


def write_report(
    profile_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    plan: str | os.PathLike[str] | None = None,
    *,
    workload: Workload | str | None = None,
    explain: bool = False,
    progress: Progress = silent,
) -> WrittenReport:
    """Write a profile, and a plan that was made from it, as one page that needs nothing else.

    Args:
        profile_dir: what `ditopt profile` wrote, finished.
        out: the page.
        plan: the plan's file.
        workload: what was profiled, or the command-line argument that names it; loaded from where
            the profile says if None. It turns results into frames, and `explain` compiles it.
        explain: compile the model with the plan and list every decision.
        progress: told about each stage.

    Raises:
        ProfileError: no profile, half of one, or a damaged file.
        PlanError: malformed, or of another model.
        FileError: the page cannot be written.
    """
    evidence = Evidence.load(Path(profile_dir), None if plan is None else Path(plan))
    source = _Source(evidence, workload)
    progress("report", 0, 3)
    pictures = _pictures(evidence, source)
    progress("report", 1, 3)
    decisions = _decisions(evidence, source, explain)
    progress("report", 2, 3)
    page = render(evidence, pictures, decisions)
    write_text(out, page.html)
    progress("report", 3, 3)
    title, lead = page.headline
    return WrittenReport(Path(out), len(page.html.encode()), title, lead, page.sections)


class _Source:
    """The profiled workload, loaded once and only where a section needs it."""

    def __init__(self, evidence: Evidence, workload: Workload | str | None) -> None:
        self._evidence = evidence
        self._given = workload
        self._loaded: Workload | None = None

    def load(self) -> Workload:
        """The workload.

        Raises:
            WorkloadError: it cannot be found, or loading it would run code of the profile's own.
        """
        if self._loaded is None:
            given = self._given
            if given is None:
                given = self._trusted()
            self._loaded = load_workload(given) if isinstance(given, str) else given
        return self._loaded

    def _trusted(self) -> str:
        """Where the profile says; a folder from a stranger must not bring its own program."""
        source = self._evidence.profile.source
        remedy = "Name it: --workload WORKLOAD."
        if source is None:
            raise WorkloadError("the profile does not say where its workload is", remedy=remedy)
        path = Path(source.removeprefix("diffusers:").rpartition(".py")[0] or source)
        folder = self._evidence.folder.resolve()
        if not path.is_absolute() or path.resolve().is_relative_to(folder):
            raise WorkloadError(
                "the profile's workload lies inside the profile or has no absolute path, so it is "
                "not run unasked",
                remedy=remedy,
            )
        return source


def _pictures(evidence: Evidence, source: _Source) -> Sheets | Missing:
    """Frames of the first audit seed that both results are kept for."""
    folder, plan = evidence.folder, evidence.plan
    plan_it = f"ditopt plan {folder} --min-psnr 30 -o {evidence.plan_path or 'plan.yaml'}"
    if plan is None:
        return Missing("There is no plan in this report.", (plan_it,))
    audits = [v for v in plan.verification if v.adopted and v.purpose == "audit"]
    for seed in (seed for record in audits for seed in record.seeds):
        dense, optimized = (
            tensors(folder / f"{kind}_{seed}.safetensors") for kind in ("dense", "optimized")
        )
        if dense is None or optimized is None:
            continue
        if "result" not in dense or "result" not in optimized:
            raise ProfileError(
                f"the results of seed {seed} hold no tensor `result`",
                remedy=f"Delete dense_{seed}.safetensors and optimized_{seed}.safetensors and plan "
                "again.",
            )
        try:
            workload = source.load()
            if workload.frames is None:
                return Missing("The workload has no function `frames` that draws its results.")
            return sheets(seed, *(_frames(workload, kind["result"]) for kind in (dense, optimized)))
        except DitoptError as error:
            return Missing(f"Results cannot be turned into frames: {error}")
    return Missing("Results of the audit seeds are not in this folder.", (plan_it,))


def _frames(workload: Workload, result: Tensor) -> Frames:
    """A result as pictures; what the workload's own code raises names its place."""
    assert workload.frames is not None
    try:
        return workload.frames(result)
    except Exception as error:
        raise WorkloadError(f"Workload.frames failed: {type(error).__name__}: {error}") from error


def _decisions(evidence: Evidence, source: _Source, explain: bool) -> list[Decision] | Missing:
    """Every decision of compiling the workload's model with the plan."""
    again = (
        f"ditopt report {evidence.folder} --plan {evidence.plan_path or 'plan.yaml'} --explain "
        "-o report.html"
    )
    if evidence.plan is None or not explain:
        return Missing("The model was not compiled for this report.", (again,))
    from ditopt.inspection import explain as explain_plan

    return explain_plan(source.load(), evidence.plan)

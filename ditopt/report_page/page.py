"""The page itself: sections from the evidence, one template, everything inlined."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from ditopt.report_page import charts
from ditopt.report_page.decisions import checks, formats, grouped
from ditopt.report_page.heads import heads, left_out
from ditopt.report_page.schedule import schedule
from ditopt.report_page.summary import summary

if TYPE_CHECKING:
    from ditopt.report import Decision
    from ditopt.report_page.evidence import Evidence
    from ditopt.report_page.pictures import Sheets

_SCRIPTS = ("base.js", "heads.js", "frames.js")


@dataclass(frozen=True)
class Missing:
    """Why a section is empty, and the commands that fill it."""

    reason: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A rendered report.

    Attributes:
        html: the whole document.
        sections: for each section "shown", or why it is empty.
        headline: the page's title and its sentence.
    """

    html: str
    sections: dict[str, str]
    headline: tuple[str, str]


@dataclass
class _Sections:
    """What the template draws, and what is missing."""

    values: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, Missing] = field(default_factory=dict)

    def add(self, name: str, value: Any, missing: Missing) -> None:
        """A section, or what to do about its absence."""
        self.values[name] = value
        if not value:
            self.missing[name] = missing


def render(
    evidence: Evidence, pictures: Sheets | Missing, decisions: list[Decision] | Missing
) -> Page:
    """The page of a profile and its plan.

    Args:
        evidence: what was read.
        pictures: frames to compare, or why there are none.
        decisions: of compiling with the plan, or why there are none.
    """
    folder = str(evidence.folder)
    plan_file = str(evidence.plan_path) if evidence.plan_path is not None else "plan.yaml"
    make_plan = f"ditopt plan {folder} --min-psnr 30 -o {plan_file}"
    again = f"ditopt report {folder} --plan {plan_file} -o report.html"
    plan, search = evidence.plan, evidence.search
    no_plan = Missing("There is no plan in this report.", (make_plan, again))
    parts = _Sections()
    found = heads(evidence)
    profile_it = f"ditopt profile WORKLOAD -o {folder}"
    parts.add("heads", found, Missing("No attention of this model was profiled.", (profile_it,)))
    has_maps = found is not None and found["maps"] is not None
    parts.add("maps", has_maps, Missing("Attention maps were not recorded.", (profile_it,)))
    parts.add("steps", None if plan is None else schedule(plan), no_plan)
    layers = [] if plan is None else [linear.id for linear in plan.model.linears]
    tables = [] if plan is None else formats(plan.phases, layers)
    parts.add("formats", tables, _no_formats(evidence, make_plan))
    drawn = [] if search is None else [charts.pareto(search, plan), charts.scatter(search)]
    no_search = Missing("No search is recorded in this folder.", (make_plan,))
    parts.add("search", [chart for chart in drawn if chart is not None], no_search)
    parts.add("checks", [] if plan is None else checks(plan.verification, plan.goal), no_plan)
    told = [] if isinstance(decisions, Missing) else grouped(decisions)
    absent = decisions if isinstance(decisions, Missing) else Missing("Nothing was decided.")
    parts.add("decisions", told, absent)
    frames = None if isinstance(pictures, Missing) else pictures
    parts.add("frames", frames, pictures if isinstance(pictures, Missing) else Missing(""))
    head = summary(evidence)
    data = {
        "heads": found,
        "frames": None if frames is None else asdict(frames),
    }
    style = _read("page.css")
    script = "\n".join(map(_read, _SCRIPTS))
    html = _template().render(
        **parts.values,
        missing=parts.missing,
        summary=head,
        plan=plan,
        profile=evidence.profile,
        search_record=search,
        other_plan=plan is not None and search is not None and not evidence.about_this_plan,
        left_out=left_out(evidence.profile),
        notes=_notes(evidence),
        data=data,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    said = {
        name: parts.missing[name].reason if name in parts.missing else "shown"
        for name in parts.values
    }
    return Page(html, said, (head.title, head.lead))


def _no_formats(evidence: Evidence, make_plan: str) -> Missing:
    if evidence.linears is None:
        profile_it = f"ditopt profile WORKLOAD -o {evidence.folder} --linears"
        return Missing("Number formats were not profiled.", (profile_it, make_plan))
    if evidence.plan is None:
        return Missing("There is no plan in this report.", (make_plan,))
    return Missing("The plan leaves every linear layer as it is.")


def _notes(evidence: Evidence) -> tuple[str, ...]:
    """Assumptions and notes, each once."""
    lines = list(evidence.profile.notes)
    if evidence.plan is not None:
        lines = [*evidence.plan.assumptions, *lines]
    if evidence.linears is not None:
        lines += evidence.linears.notes
    return tuple(dict.fromkeys(lines))


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a Content-Security-Policy names an inline style or script by."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_read("page.html.jinja"))

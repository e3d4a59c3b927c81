"""The page as text: what it says, what it misses, and that nothing in a file becomes markup."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

from ditopt.cli import app
from ditopt.errors import PlanError, ProfileError
from ditopt.plan import Phase, Plan, Verification
from ditopt.profiling.schema import SeedRecord
from ditopt.quantization import LinearRule
from ditopt.quantization.arithmetic import ArithmeticRule
from ditopt.report import Decision
from ditopt.report_page import build, write_report
from ditopt.report_page.decisions import formats, grouped
from ditopt.report_page.schedule import schedule
from ditopt.report_page.summary import summary
from ditopt.workload import load_workload

from .folders import (
    SHIFTED,
    WORKLOAD,
    make_plan,
    write_analysis,
    write_everything,
    write_profile,
    write_results,
    write_search,
)

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'


class Elements(HTMLParser):
    """Names and attributes of every element, and the text of the page's data."""

    def __init__(self, text):
        super().__init__()
        self.found, self.data, self._inside = [], "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = tag == "script" and ("id", "data") in attrs

    def handle_data(self, data):
        if self._inside:
            self.data += data

    def handle_endtag(self, tag):
        self._inside = False


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with everything, and its page."""
    base = tmp_path_factory.mktemp("whole")
    plan = write_everything(base / "prof")
    written = write_report(base / "prof", base / "report.html", plan)
    return base, written, (base / "report.html").read_text(encoding="utf-8")


def test_every_section_is_there(whole):
    _, written, text = whole
    empty = {name for name, state in written.sections.items() if state != "shown"}
    assert empty == {"decisions"}
    assert written.size == len(text.encode()) < 500_000


def test_the_headline_has_speed_and_quality(whole):
    _, written, text = whole
    assert written.title == "2.30× as fast at 30.9 dB"
    assert "Predicted 2.40× the speed of dense sampling, measured 2.30×." in written.lead
    assert "the goal was PSNR ≥ 30 dB" in written.lead
    assert "minimum 30.2, 10th percentile 30.3" in text


EXACT = Verification(
    purpose="audit",
    seeds=(2000,),
    psnr_db=(200.0,),
    mean_psnr_db=200.0,
    min_psnr_db=200.0,
    p10_psnr_db=200.0,
    passed=True,
    adopted=True,
)


@pytest.mark.parametrize(
    ("left_out", "title"),
    [
        ({}, "2.40× as fast (predicted) at 30.9 dB"),
        ({"verification": ()}, "2.40× as fast (predicted), not verified"),
        ({"verification": (), "predicted": None}, "Plan for ToyDiT"),
        ({"verification": (EXACT,)}, "2.40× as fast (predicted), equal up to rounding"),
    ],
)
def test_what_was_not_measured_is_not_claimed(left_out, title, tmp_path):
    plan = make_plan(write_profile(tmp_path / "prof", maps=False))
    plan.model_copy(update=left_out).save(tmp_path / "plan.yaml")
    evidence = build.Evidence.load(tmp_path / "prof", tmp_path / "plan.yaml")
    found = summary(evidence)
    assert found.title == title
    assert ("A plan written by hand" in found.lead) == ("predicted" in left_out)
    assert {tile.name: tile.value for tile in found.tiles}["Measured speedup"] == "–"


def test_the_page_needs_nothing_else(whole):
    elements = Elements(whole[2])
    for tag, attributes in elements.found:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
        assert "style" not in attributes  # the policy below refuses such attributes
        assert not any(name.startswith("on") for name in attributes)


def test_the_policy_names_the_pages_own_script_and_style(whole):
    text = whole[2]
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy
    for kind, pattern in (("script", "<script>(.*)</script>"), ("style", "<style>(.*)</style>")):
        content = re.search(pattern, text, re.DOTALL)[1].encode()
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy.replace("&#39;", "'")


def test_the_data_say_what_the_plan_says(whole):
    base, _, text = whole
    data = json.loads(Elements(text).data)["heads"]
    plan = Plan.load(base / "plan.yaml")
    assert len(data["phases"]) == 2
    first = [data["choices"][number] for number in data["phases"][0]["choice"][0]]
    assert {choice["name"] for choice in first} == {"dense"}
    site = data["sites"][0]["id"]
    for head, number in enumerate(data["phases"][1]["choice"][0]):
        choice = data["choices"][number]
        assert choice["family"] == plan.phases[1].attention[site][head].kind
        assert len(base64.b64decode(choice["mask"])) == choice["rows"] * choice["columns"]
    last = data["choices"][data["phases"][1]["choice"][2][0]]
    assert (last["family"], last["density"], last["mask"]) == ("selector", 0.25, None)
    assert data["phases"][1]["error"][2] == [None] * 4  # a selector's error is not in a profile
    assert data["phases"][0]["error"][0] == [0.0] * 4


def test_8_bit_attention_is_said_at_its_heads(tmp_path):
    folder, page = tmp_path / "prof", tmp_path / "report.html"
    profile = write_profile(folder)
    plan = make_plan(profile)
    bare, listed = list(profile.shapes)[:2]
    update = {
        "attention": {listed: plan.phases[1].attention[listed]},
        "arithmetic": dict.fromkeys((bare, listed), ArithmeticRule(kind="int8_qk")),
    }
    phases = (plan.phases[0], plan.phases[1].model_copy(update=update))
    plan.model_copy(update={"phases": phases}).save(tmp_path / "plan.yaml")

    def shown():
        write_report(folder, page, tmp_path / "plan.yaml")
        text = page.read_text(encoding="utf-8")
        data = json.loads(Elements(text).data)["heads"]
        rows = [site["id"] for site in data["sites"]].index(bare)
        phase = data["phases"][1]
        return [data["choices"][n] for n in phase["choice"][rows]], phase["error"][rows], text, data

    choices, errors, text, data = shown()
    assert {(c["name"], c["parameters"]) for c in choices} == {("dense", "products int8_qk")}
    assert errors == [None] * 4  # this profile has not measured it
    assert "2 attentions int8_qk" in text
    ends = [c["parameters"].endswith("products int8_qk") for c in data["choices"]]
    assert sum(ends) == 1 + len(set(plan.phases[1].attention[listed]))

    rounding = {site: torch.full((3, 4, 1), 0.01, dtype=torch.float64) for site in profile.shapes}
    record = SeedRecord.load(folder, 0, profile)
    record.model_copy(update={"arithmetic_error": rounding}).save(folder, 0)
    profile.model_copy(update={"arithmetics": ("int8_qk",)}).save(folder)
    assert shown()[1] == [0.1] * 4  # the root of 0.01 of the norm


def test_what_a_choice_captures_is_the_profiles_number(whole):
    data = json.loads(Elements(whole[2]).data)["heads"]
    assert data["phases"][0]["captured"][0] == [[1.0] * 3] * 4  # dense keeps everything
    skipped = data["phases"][1]["captured"][0][0]
    assert skipped == [0.0] * 3


def test_nothing_from_a_file_becomes_markup(tmp_path):
    folder = tmp_path / "prof"
    names = dict.fromkeys(("name", "blocks", "hardware"), EVIL)
    profile = write_profile(folder, **names, notes=(f"a note {EVIL}",))
    write_analysis(folder, profile)
    make_plan(profile, assumptions=(f"assumed {EVIL}",)).save(tmp_path / "plan.yaml")
    write_search(folder, tmp_path / "plan.yaml")
    told = [Decision(EVIL, EVIL, False, EVIL)]
    evidence = build.Evidence.load(folder, tmp_path / "plan.yaml")
    text = build.render(evidence, build.Missing(EVIL, (EVIL,)), told).html
    elements = Elements(text)
    assert sum(tag == "script" for tag, _ in elements.found) == 2
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in elements.found)
    assert text.count("alert(1)") > 20  # told, but as text
    assert json.loads(elements.data)["heads"]["sites"][0]["id"].startswith(EVIL)


def test_a_page_of_a_large_model_stays_small(tmp_path):
    folder = tmp_path / "prof"
    plan = write_everything(folder, layers=60, heads=40)
    write_results(folder, size=(8, 320, 320), noise=1.0)
    written = write_report(folder, tmp_path / "report.html", plan)
    assert written.sections["frames"] == written.sections["maps"] == "shown"
    assert written.size < 5_000_000


def test_without_a_plan_the_page_says_how_to_make_one(tmp_path):
    folder = tmp_path / "prof"
    write_profile(folder, maps=False)
    written = write_report(folder, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert written.title == "Profile of ToyDiT"
    assert written.sections["steps"] == "There is no plan in this report."
    assert f"ditopt plan {folder} --min-psnr 30 -o plan.yaml" in text
    assert f"ditopt report {folder} --plan plan.yaml -o report.html" in text
    assert f"ditopt profile WORKLOAD -o {folder} --linears" in text
    assert written.sections["maps"] == "Attention maps were not recorded."
    assert written.sections["search"] == "No search is recorded in this folder."


def test_a_plan_in_another_order_is_drawn_in_the_models_own(tmp_path):
    folder = tmp_path / "prof"
    profile = write_profile(folder)
    make_plan(profile, order=SHIFTED).save(tmp_path / "plan.yaml")
    write_report(folder, tmp_path / "report.html", tmp_path / "plan.yaml")
    data = json.loads(Elements((tmp_path / "report.html").read_text(encoding="utf-8")).data)
    window = next(c for c in data["heads"]["choices"] if c["family"] == "window")
    assert window["order"] == "tile"
    shares = list(base64.b64decode(window["mask"]))
    assert any(0 < share < 255 for share in shares)  # blocks of an order are parts of others
    assert sum(shares) / 255 / len(shares) == pytest.approx(window["density"], abs=0.01)
    assert data["heads"]["phases"][1]["error"][0][1:] == [None] * 3  # not measured in this order


def test_half_a_profile_is_refused_and_the_old_page_stays(tmp_path):
    folder = tmp_path / "prof"
    profile = write_profile(folder)
    profile.model_copy(update={"finished": (), "costs": None}).save(folder)
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(ProfileError, match="is half written: 0 of 1 seeds"):
        write_report(folder, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "old"


def test_damaged_maps_are_named(tmp_path):
    folder = tmp_path / "prof"
    write_profile(folder)
    path = folder / "maps_0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ProfileError, match=r"maps_0\.safetensors is missing or damaged"):
        write_report(folder, tmp_path / "report.html")


def test_a_plan_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "prof"
    plan = make_plan(write_profile(folder))
    other = plan.model.model_copy(update={"architecture": "c" * 64, "name": "OtherDiT"})
    plan.model_copy(update={"model": other}).save(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match="the plan is for OtherDiT, the profile of ToyDiT"):
        write_report(folder, tmp_path / "report.html", tmp_path / "plan.yaml")


@pytest.mark.parametrize("inside", [True, False])
def test_a_profile_does_not_bring_its_own_program(inside, tmp_path):
    """A folder from a stranger may name a file that lies in it, or a relative path."""
    folder = tmp_path / "prof"
    folder.mkdir()
    (folder / "mine.py").write_text("raise SystemExit('this ran')")
    source = f"{folder.resolve() / 'mine.py'}:workload" if inside else "mine.py:workload"
    profile = write_profile(folder, source=source)
    make_plan(profile).save(tmp_path / "plan.yaml")
    write_results(folder)
    written = write_report(folder, tmp_path / "report.html", tmp_path / "plan.yaml")
    assert "so it is not run unasked. Name it: --workload WORKLOAD." in written.sections["frames"]


def test_a_workload_can_be_given(tmp_path):
    folder = tmp_path / "prof"
    make_plan(write_profile(folder)).save(tmp_path / "plan.yaml")
    write_results(folder)
    arguments = (folder, tmp_path / "report.html", tmp_path / "plan.yaml")
    missing = write_report(*arguments).sections["frames"]
    assert "the profile does not say where its workload is" in missing
    (tmp_path / "given.py").write_text(WORKLOAD)
    given = str(tmp_path / "given.py")
    assert write_report(*arguments, workload=given).sections["frames"] == "shown"
    (tmp_path / "plain.py").write_text(WORKLOAD.replace(", frames=frames", ""))
    plain = load_workload(str(tmp_path / "plain.py"))
    assert "no function `frames`" in write_report(*arguments, workload=plain).sections["frames"]
    broken = replace(plain, frames=lambda result: result.nothing)
    assert (
        "Workload.frames failed: AttributeError"
        in (write_report(*arguments, workload=broken).sections["frames"])
    )


def test_decisions_are_listed_on_request(whole, monkeypatch):
    base, _, _ = whole
    told = [
        Decision("blocks.0.attn1#0", "route", True, "sparse"),
        Decision("blocks.1.attn1#0", "route", True, "sparse"),
        Decision("model", "cuda_graphs", False, "no CUDA device"),
    ]
    monkeypatch.setattr("ditopt.inspection.explain", lambda workload, plan: told)
    out = base / "explained.html"
    written = write_report(base / "prof", out, base / "plan.yaml", explain=True)
    assert written.sections["decisions"] == "shown"
    assert "no CUDA device" in out.read_text(encoding="utf-8")
    assert [found.sites for found in grouped(told)] == [
        ("blocks.0.attn1#0", "blocks.1.attn1#0"),
        ("model",),
    ]


def test_skipped_calls_name_what_they_are_made_of(tmp_path):
    found = schedule(make_plan(write_profile(tmp_path / "prof", maps=False)))
    assert [call.full for call in found.calls].count(True) == found.full == 6
    assert json.loads(found.calls[7].row) == [[6, "1.60"], [3, "-0.60"]]
    assert "1.60 × call 6" in found.calls[7].tip
    assert found.phases[1] == (8, "calls 4 to 11: 3 sparse attentions, 6 layers int8_row")


def test_formats_are_told_by_role_and_block(tmp_path):
    plan = make_plan(write_profile(tmp_path / "prof", maps=False))
    layers = [linear.id for linear in plan.model.linears]
    (table,) = formats(plan.phases, layers)
    assert table.name == "calls 4 to 11"
    assert table.columns == ("0", "1", "2")
    cells = dict(table.rows)
    assert cells["blocks.*.attn1.to_q"][0] == ("·", "none", "blocks.0.attn1.to_q: left alone")
    assert cells["blocks.*.ff.down"][2] == (
        "int8",
        "format8",
        "blocks.2.ff.down: int8_row, balance",
    )
    stored = LinearRule(format="int4_group", activation="int8_row", transform="rotate_twice")
    phases = [Phase(calls=calls, linear={"head": stored}) for calls in ((0, 2), (2, 9))]
    (table,) = formats(phases, ["head"])  # the same in both
    assert table.name == "calls 0 to 8"
    ((_, (cell,)),) = table.rows
    assert cell == ("int4", "format4", "head: int4_group, int8_row, rotate_twice")


def test_the_command_prints_and_writes(whole, tmp_path):
    base, _, _ = whole
    out = str(tmp_path / "page.html")
    call = ["report", str(base / "prof"), "--plan", str(base / "plan.yaml"), "-o", out]
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert "decisions: The model was not compiled for this report." in result.output
    assert "Report written to" in result.output
    result = CliRunner().invoke(app, [*call, "--json", "-"], catch_exceptions=False)
    written = json.loads(result.output)
    assert written["title"] == "2.30× as fast at 30.9 dB"
    assert written["sections"]["frames"] == "shown"


def test_a_search_for_another_plan_is_said_to_be_one(whole, tmp_path):
    base, _, _ = whole
    plan = Plan.load(base / "plan.yaml")
    plan.model_copy(update={"assumptions": ("changed by hand",)}).save(tmp_path / "plan.yaml")
    written = write_report(base / "prof", tmp_path / "page.html", tmp_path / "plan.yaml")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The recorded search ended in another plan than this one." in text
    assert "measured" not in written.lead

import json
import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

from ditopt import cli
from ditopt.bench_result import BenchResult, Row
from ditopt.cli.entry import find_cause, format_warning
from ditopt.cli.sizes import parse_bytes
from ditopt.errors import DitoptWarning, PlanError, ProfileError, VerificationError
from ditopt.inspection import Explanation
from ditopt.report import Decision

COMMANDS = ("inspect", "profile", "plan", "recipe", "explain", "report", "bench", "demo")
WORKLOAD = """
import torch
from ditopt import Workload

def workload():
    return Workload(torch.nn.Identity().eval(), lambda model, seed: model(torch.ones(4, 4)))
"""


@pytest.fixture
def workload(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(WORKLOAD)
    return str(path)


@pytest.fixture
def fake(monkeypatch):
    """Put functions in the place of a ditopt module that a command imports when it runs."""

    def install(module, **functions):
        stand_in = types.SimpleNamespace(**functions)
        monkeypatch.setitem(sys.modules, f"ditopt.{module}", stand_in)

    return install


def invoke(*args):
    return CliRunner().invoke(cli.app, args, catch_exceptions=False)


def run_main(monkeypatch, *args):
    """The exit code of the installed `ditopt` command."""
    monkeypatch.setattr(sys, "argv", ["ditopt", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def row(variant, ms, psnr_db):
    fields = {"ssim": 0.99, "max_error": 0.1, "compile_s": 3.0, "peak_bytes": 2**20}
    ran = {"full_steps": 12, "skipped_steps": 8}
    return Row(variant, ms, ms and 1.0, psnr_db, psnr_db, **fields, seeds=(7,), ran=ran)


def measured(*failures):
    ms = (None, None) if failures else (2000.0, 1000.0)
    where = {
        "workload": "toy",
        "name": "CPU",
        "threads": 2,
        "torch": "2.13.0",
        "date": "2026-01-01",
    }
    rows = (
        row("eager", ms[0], None),
        row("inductor", ms[0], 90.0),
        row("ditopt+plan", ms[1], 31.0),
    )
    return BenchResult(where, rows, failures)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from ditopt.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'diffusers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_a_missing_file_ends_with_one_line_and_code_2(command, monkeypatch, capsys):
    assert run_main(monkeypatch, command, "nowhere.py") == 2
    assert capsys.readouterr().err == "ditopt: no such file: 'nowhere.py'\n"


def test_a_missing_argument_ends_with_code_2(monkeypatch, capsys):
    assert run_main(monkeypatch, "profile", "mine.py") == 2
    assert "--out" in capsys.readouterr().err


def test_an_error_inside_a_backend_is_found(workload, fake, monkeypatch, capsys):
    class BackendCompilerFailed(RuntimeError):
        inner_exception = PlanError("the plan is for another model")

    def fails(*args):
        raise BackendCompilerFailed("long story")

    fake("inspection", explain_fully=fails)
    fake("plan", Plan=types.SimpleNamespace(load=lambda path: None))
    assert run_main(monkeypatch, "explain", workload, "--plan", "plan.yaml") == 2
    assert capsys.readouterr().err == "ditopt: the plan is for another model\n"


def test_a_bug_keeps_its_traceback(workload, fake, monkeypatch):
    def fails(workload):
        raise ZeroDivisionError

    fake("inspection", inspect_workload=fails)
    monkeypatch.setattr(sys, "argv", ["ditopt", "inspect", workload])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_inspect_prints_a_table_or_json(workload, fake):
    report = types.SimpleNamespace(table=lambda: "a table", to_json=lambda: {"sites": []})
    fake("inspection", inspect_workload=lambda workload: report)
    assert invoke("inspect", workload).output == "a table\n"
    assert json.loads(invoke("inspect", workload, "--json", "-").output) == {"sites": []}


def test_profile_passes_its_options_on(workload, fake, tmp_path):
    seen = {}

    def profile(loaded, out, seeds, progress, spec, source):
        seen.update(name=loaded.title, out=out, seeds=seeds, spec=spec)
        assert source == f"{workload}:workload"
        progress("profile", 1, 2)
        return types.SimpleNamespace(model_dump=lambda mode: {"seeds": [0]})

    fake("profiling", profile=profile, ProfileSpec=lambda **options: options)
    target = tmp_path / "out.json"
    options = ("--memory-budget", "512MiB", "--first-seed", "4", "--for-device", "L40S")
    result = invoke(
        "profile", workload, "-o", "prof", "--seeds", "3", *options, "--json", str(target)
    )
    assert result.output == "Profile written to prof.\n"
    assert (seen["name"], str(seen["out"]), seen["seeds"]) == ("Identity", "prof", 3)
    assert seen["spec"] == {
        "memory_bytes": 512 << 20,
        "first_seed": 4,
        "for_device": "L40S",
        "measure_again": False,
    }
    assert json.loads(target.read_text()) == {"seeds": [0]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512MiB", 512 << 20), ("2G", 2 << 30), ("1.5 GB", 1_500_000_000), ("4096", 4096)],
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("much", "expected an amount of memory, got 'much'"), ("1KiB", "expected at least 1 MiB")],
)
def test_a_bad_memory_budget_is_refused(workload, monkeypatch, capsys, text, message):
    assert run_main(monkeypatch, "profile", workload, "-o", "p", "--memory-budget", text) == 2
    assert message in capsys.readouterr().err


def test_layers_are_not_timed_for_another_device(workload, monkeypatch, capsys):
    options = ("-o", "prof", "--linears", "--for-device", "L40S")
    assert run_main(monkeypatch, "profile", workload, *options) == 2
    assert "--for-device wants no measurement" in capsys.readouterr().err


def test_merge_passes_its_folders_on(fake):
    seen = {}

    def merge(profiles, out, costs_of):
        seen.update(profiles=[str(p) for p in profiles], out=str(out), costs=str(costs_of))
        return types.SimpleNamespace(seeds=(0, 3), model_dump=lambda mode: {})

    fake("profiling", merge_profiles=merge)
    result = invoke("merge", "a", "b", "-o", "c", "--costs-of", "b")
    assert result.output == "Profile of seeds 0, 3 written to c.\n"
    assert seen == {"profiles": ["a", "b"], "out": "c", "costs": "b"}


def test_an_interrupted_profile_says_that_it_resumes(workload, fake, monkeypatch, capsys):
    def profile(*args, **kwargs):
        raise KeyboardInterrupt

    fake("profiling", profile=profile, ProfileSpec=dict)
    assert run_main(monkeypatch, "profile", workload, "-o", "prof") == 130
    assert "the same command resumes the profile" in capsys.readouterr().err


def test_a_target_that_cannot_be_written_is_refused_before_the_work(workload, monkeypatch, capsys):
    assert run_main(monkeypatch, "bench", workload, "--json", "nowhere/out.json") == 2
    assert "its folder does not exist" in capsys.readouterr().err
    assert run_main(monkeypatch, "plan", "prof", "-o", "nowhere/plan.yaml") == 2
    assert "its folder does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"min_psnr_db": 30.0}),
        (("--min-psnr", "35"), {"min_psnr_db": 35.0}),
        (("--target-speedup", "2"), {"target_speedup": 2.0}),
        (
            ("--min-ssim", "0.9", "--max-memory", "1.5MiB"),
            {"min_ssim": 0.9, "max_memory_bytes": 3 << 19},
        ),
    ],
)
def test_plan_has_goals(options, expected, tmp_path, monkeypatch):
    from ditopt.search.record import SearchRecord

    search = sys.modules["ditopt.search"]  # the package's attribute is the function of this name

    seen = {}

    def find_plan(profile_dir, goal, out, progress, options):
        seen.update(goal=goal, options=options)
        plan = types.SimpleNamespace(model_dump=lambda mode: {})
        return search.Found(plan, SearchRecord(goal=str(goal)))

    monkeypatch.setattr(search, "find_plan", find_plan)
    more = ("--audit-seeds", "16", "--max-programs", "2", "--techniques", "cache, linears")
    out = str(tmp_path / "plan.yaml")
    result = invoke("plan", "prof", "-o", out, *options, *more)
    assert "Plan written to" in result.output
    assert seen["goal"].model_dump(exclude_none=True) == expected
    assert seen["options"].techniques == ("linears", "cache")
    assert seen["options"].max_programs == 2
    assert seen["options"].loop.audit_seeds == 16
    shown = invoke("plan", "prof", "-o", out, "--pareto", "--json", "-")
    assert set(json.loads(shown.output)) == {"plan", "search"}


def test_unknown_techniques_are_refused(monkeypatch, capsys, tmp_path):
    out = str(tmp_path / "plan.yaml")
    assert run_main(monkeypatch, "plan", "prof", "-o", out, "--techniques", "attn") == 2
    assert "'attn' is none of attention, linears, cache" in capsys.readouterr().err


def test_explain_prints_decisions(workload, fake):
    decision = Decision("blocks.0", "fuse", True, "q, k and v read one tensor")
    found = Explanation([decision], [])
    fake("inspection", explain_fully=lambda workload, plan: found)
    fake("plan", Plan=types.SimpleNamespace(load=lambda path: None))
    written = json.loads(invoke("explain", workload, "--plan", "p.yaml", "--json", "-").output)
    assert written["decisions"][0]["reason"] == "q, k and v read one tensor"


def test_bench_prints_the_noise_floor_and_the_speedup(workload, fake):
    fake("bench", bench=lambda *args, **kwargs: measured(), FIRST_SEED=1000)
    output = invoke("bench", workload).output
    assert "Noise floor, torch.compile against eager: PSNR 90.0 dB." in output
    assert "2.00x" in output
    assert "12+8" in output


def test_bench_takes_a_number_of_seeds(workload, fake):
    seen = {}
    fake("bench", bench=lambda *a, **k: seen.update(k) or measured(), FIRST_SEED=5000)
    invoke("bench", workload, "--seeds", "2")
    assert list(seen["seeds"]) == [5000, 5001]


def test_a_failed_gate_shows_quality_but_no_speed(workload, fake, monkeypatch, capsys, tmp_path):
    target = tmp_path / "bench.json"
    fake("bench", bench=lambda *args, **kwargs: measured("goal missed"), FIRST_SEED=1000)
    assert run_main(monkeypatch, "bench", workload, "--json", str(target)) == 2
    captured = capsys.readouterr()
    assert "withheld" in captured.out
    assert "31.0 dB" in captured.out
    assert captured.err == "ditopt: goal missed. Speeds are withheld.\n"
    assert json.loads(target.read_text())["rows"][0]["ms"] is None


def test_warnings_of_ditopt_take_one_line():
    text = format_warning(DitoptWarning("quality not verified"), DitoptWarning, "f.py", 3)
    assert text == "warning: quality not verified\n"
    assert "f.py:3" in format_warning("old", DeprecationWarning, "f.py", 3)


def test_causes_are_found_through_chains():
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = ProfileError("0 seeds")
    assert isinstance(find_cause(wrapped), ProfileError)
    assert find_cause(RuntimeError("alone")) is None
    assert isinstance(find_cause(VerificationError("x")), VerificationError)


def test_recipe_knows_its_names_and_settings(monkeypatch, capsys, tmp_path):
    out = str(tmp_path / "plan.yaml")
    assert run_main(monkeypatch, "recipe", "svg3", str(tmp_path), "-o", out) == 2
    assert "no recipe 'svg3'" in capsys.readouterr().err
    assert run_main(monkeypatch, "recipe", "svg2", str(tmp_path), "-o", out, "--set", "mass") == 2
    assert "--set: expected KEY=VALUE, got 'mass'" in capsys.readouterr().err
    for name in ("svg2", "vidit_q"):
        assert run_main(monkeypatch, "recipe", name, str(tmp_path), "-o", out) == 2
        assert "holds no profile" in capsys.readouterr().err
    assert not (tmp_path / "plan.yaml").exists()


def test_recipe_hands_over_settings_as_yaml(fake, tmp_path):
    asked = []

    class Made:
        def save(self, path):
            asked.append(path)

        def model_dump(self, mode):
            return {"made": True}

    def make(folder, name, setting):
        asked.append((name, setting))
        return Made()

    fake(
        "recipes",
        plan_of_recipe=make,
        plan_of_recipe_for_linears=make,
        attention_recipe_names=lambda: ("window",),
        quantization_recipe_names=lambda: (),
    )
    out = tmp_path / "plan.yaml"
    settings = ("--set", "density=0.25", "--set", "frames=3")
    result = invoke("recipe", "window", "prof", "-o", str(out), *settings, "--json", "-")
    assert json.loads(result.stdout) == {"made": True}
    assert asked == [("window", {"density": 0.25, "frames": 3}), out]

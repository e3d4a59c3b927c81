"""The README says nothing that the repository does not hold."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def tables():
    path = ROOT / "benchmarks" / "readme_table.py"
    spec = importlib.util.spec_from_file_location("readme_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_recorded_results(tables):
    assert tables.readme_text() == README, "run: make docs"


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_a_recorded_bench_becomes_a_table(tables, tmp_path):
    row = {"ms": 2000.0, "ms_iqr": 20.0, "psnr_db": None, "ssim": 1.0, "compile_s": 3.0}
    where = {
        "workload": "toy",
        "name": "CPU",
        "threads": 2,
        "torch": "2.13.0",
        "date": "2026-01-01",
    }
    planned = {**row, "ms": 1000.0, "psnr_db": 31.25, "psnr_min_db": 30.0, "variant": "ditopt+plan"}
    result = {"environment": where, "rows": [{**row, "variant": "inductor"}, planned]}
    text = tables.table_text(tmp_path / "demo.json", json.loads(json.dumps(result)))
    assert "| ditopt+plan | 1.00 s (0.02) | 2.00x | 31.2 dB (30.0) | 1.000 | 3 s |" in text
    assert tables.is_bench(result)
    assert not tables.is_bench({"rows": [{**row, "variant": "inductor", "ms": None}]})
    assert not tables.is_bench([1, 2])

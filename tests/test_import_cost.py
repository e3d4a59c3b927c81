"""What importing ditopt pulls in: nothing at first, and never an optional package."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ditopt"
OPTIONAL = ("triton", "diffusers", "transformers", "onnx", "onnxruntime", "matplotlib", "skimage")
# each runs in a process of its own, so the file modules only; their packages are theirs to test
CORE = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))


def imported_by(statement, names):
    """Which of `names` a fresh process has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*(n for n in {names!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_ditopt_loads_nothing_heavy():
    heavy = ("torch", "numpy", "scipy", "networkx", "pydantic", "yaml", "rich", "typer", *OPTIONAL)
    assert imported_by("import ditopt", heavy) == []


def test_listing_public_names_loads_nothing_heavy():
    assert imported_by("import ditopt; dir(ditopt)", ("torch",)) == []


def test_core_modules_need_no_optional_package():
    statement = "import " + ", ".join(f"ditopt.{name}" for name in CORE)
    # torch's CUDA build brings Triton along and may load it by itself
    by_torch = imported_by("import torch._dynamo, torch._inductor.utils", OPTIONAL)
    assert set(imported_by(statement, OPTIONAL)) <= set(by_torch)


@pytest.mark.parametrize("blocked", ["triton", "diffusers", "onnx"])
def test_core_modules_import_without_an_optional_package(blocked):
    block = f"sys.modules[{blocked!r}] = None"
    imported_by(f"{block}\nimport ditopt.workload, ditopt.bench, ditopt.cli, ditopt.config", ())


@pytest.mark.parametrize("name", ["search", "bench"])
def test_public_functions_win_over_files_of_the_same_name(name):
    statement = f"import ditopt.{name}, ditopt; assert callable(ditopt.{name}), ditopt.{name}"
    imported_by(statement, ())


def test_unknown_names_are_attribute_errors():
    imported_by("import ditopt; assert not hasattr(ditopt, 'nothing')", ())

"""The layout that docs/architecture.md promises: one package, three decorative links."""

import importlib
import os
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ditopt

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ditopt"
LINKS = ("passes", "kernels", "backends")
NEEDS = {"triton", "onnx", "onnxscript", "onnxruntime", "diffusers", "flash_attn", "torch_tensorrt"}
SOURCES = sorted(
    path.relative_to(ROOT).with_suffix("")
    for path in PACKAGE.rglob("*.py")
    if "__pycache__" not in path.parts
)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_file_imports(path):
    name = ".".join(path.parts).removesuffix(".__init__")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # files that drive an optional package may need it; nothing else may be missing
        if (error.name or "").partition(".")[0] not in NEEDS:
            raise


@pytest.mark.parametrize("name", LINKS)
def test_links_are_relative_and_resolve(name):
    assert os.readlink(ROOT / name) == f"ditopt/{name}"
    assert (ROOT / name).resolve() == PACKAGE / name
    assert (ROOT / name).is_dir()


def test_kernels_is_no_regular_package():
    # with an __init__.py, `import kernels` in the checkout would shadow Hugging Face's package
    assert not (PACKAGE / "kernels" / "__init__.py").exists()


def test_the_links_are_never_imported():
    for name in LINKS:
        file = getattr(sys.modules.get(name), "__file__", None)
        assert file is None or not Path(file).resolve().is_relative_to(ROOT)


def test_every_subpackage_is_found_by_walking():
    found = {module.name for module in pkgutil.walk_packages(ditopt.__path__, "ditopt.")}
    assert {"ditopt.passes", "ditopt.backends", "ditopt.runtime"} <= found


def test_no_conftest_at_the_root():
    assert not (ROOT / "conftest.py").exists()


def test_the_wheel_holds_every_source_file(tmp_path):
    tracked = subprocess.run(
        ["git", "ls-files", "ditopt"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout, so there is no list of source files")
    source = tmp_path / "source"
    for name in [*tracked, "pyproject.toml", "README.md", "LICENSE"]:
        if (ROOT / name).exists():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    for name in LINKS:
        (source / name).symlink_to(f"ditopt/{name}")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("ditopt/")}
    kinds = (".py", ".typed", ".yaml", ".cpp", ".css", ".js", ".jinja")
    expected = {name for name in tracked if (ROOT / name).exists() and name.endswith(kinds)}
    assert packed == expected

"""Dependencies point one way: passes and backends use core, kernels use torch alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ditopt"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
PARTS = ("passes", "kernels", "backends")
MAY_NAME_CONCRETE = {"ditopt.pipeline"}  # the one readable list of passes and backends
KERNELS_MAY_IMPORT = {"torch", "triton", "ditopt", "yaml", "flash_attn"}  # configs; an extra


def imports(name, path):
    """Every module that a file imports, at its top or inside a function, by absolute name."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def part_of(module):
    """`passes`, `kernels` or `backends` where a module lies in one of them, else None."""
    names = module.split(".")
    return names[1] if len(names) > 2 and names[0] == "ditopt" and names[1] in PARTS else None


@pytest.mark.parametrize("name", [n for n in FILES if part_of(n) == "kernels"])
def test_kernels_use_torch_only(name):
    for module in imports(name, FILES[name]):
        top = module.partition(".")[0]
        assert top in KERNELS_MAY_IMPORT or top in sys.stdlib_module_names, module
        if top == "ditopt" and module != "ditopt":
            allowed = module.startswith(("ditopt.kernels", "ditopt.errors"))
            assert allowed, f"{name} imports {module}"


@pytest.mark.parametrize("name", [n for n in FILES if part_of(n) is None])
def test_core_names_no_concrete_pass_or_backend(name):
    if name in MAY_NAME_CONCRETE:
        return
    concrete = {
        module
        for module in imports(name, FILES[name])
        if part_of(module) in ("passes", "backends") and module.split(".")[2] != "base"
    }
    assert not concrete, f"{name} imports {concrete}; only pipeline.py may"


@pytest.mark.parametrize("name", [n for n in FILES if part_of(n) == "passes"])
def test_passes_do_not_import_each_other_or_a_backend(name):
    for module in imports(name, FILES[name]):
        assert part_of(module) != "backends", f"{name} imports {module}"
        assert "cli" not in module.split("."), f"{name} imports {module}"


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_imported_through_the_links(name):
    tops = {module.partition(".")[0] for module in imports(name, FILES[name])}
    assert not tops & set(PARTS), f"{name}: import ditopt.{', ditopt.'.join(tops & set(PARTS))}"


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_longer_than_500_lines(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 500

"""What replaces ditopt's operators in a native program, before anything is compiled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ditopt.backends import aoti_cpu
from ditopt.backends.aoti import _check_linkage, _inline_operators
from ditopt.errors import EngineError
from ditopt.kernels.block_selection import ops as _selection  # noqa: F401  (registers operators)
from ditopt.kernels.block_sparse_attention import flex
from ditopt.kernels.quantize_rows import ops as _rounding  # noqa: F401
from ditopt.kernels.quantize_rows import reference
from ditopt.passes.base import EXECUTOR
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE


def attention(executor: str | None, dtype: torch.dtype, *, strided: bool = False) -> fx.GraphModule:
    graph = fx.Graph()
    q = torch.empty(1, 2, 8, 32, dtype=dtype)
    values = [q.transpose(2, 3) if strided else q] * 3
    values += [torch.empty(1, 2, 4, dtype=torch.int32), torch.empty(1, 2, 4, 4, dtype=torch.int32)]
    inputs = [graph.placeholder(f"x{k}") for k in range(5)]
    for node, value in zip(inputs, values, strict=True):
        node.meta["val"] = value
    call = graph.call_function(BLOCK_SPARSE, (*inputs, 8, 8, 0.5))
    if executor is not None:
        call.meta[EXECUTOR] = executor
    graph.output((call,))
    return fx.GraphModule({}, graph)


def called(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("executor", "dtype", "strided", "expected"),
    [
        ("cpu", torch.float32, False, aoti_cpu.OPERATOR),
        (None, torch.float32, False, aoti_cpu.OPERATOR),
        ("flex", torch.float32, False, flex.block_sparse_attention),
        ("cpu", torch.bfloat16, False, flex.block_sparse_attention),
        ("cpu", torch.float32, True, flex.block_sparse_attention),
    ],
)
def test_attention_has_the_executor_of_the_compiled_model_where_it_can(
    executor: str | None, dtype: torch.dtype, strided: bool, expected: Any
) -> None:
    gm = attention(executor, dtype, strided=strided)
    assert _inline_operators(gm) == []
    assert called(gm) == [expected]


def test_the_kernel_s_function_is_declared_and_defined_outside_of_its_namespace() -> None:
    ((operator, (text,)),) = aoti_cpu.shims().items()
    assert operator is BLOCK_SPARSE
    declared, _, rest = text.partition(";")
    assert declared.startswith("AOTITorchError aoti_torch_cpu_block_sparse_attention(")
    inside, _, behind = rest.partition("}  // namespace ditopt_kernel")
    assert "void ditopt_block_sparse_attention(const Call* given)" in inside
    assert behind.count(declared) == 1
    # What follows the declaration closes the block that AOTInductor opens, and opens it again.
    assert rest.lstrip().startswith("}")
    assert behind.count("{") == behind.count("}") + 1


def test_rounding_kernels_become_plain_operators() -> None:
    graph = fx.Graph()
    parts = [graph.placeholder("a"), graph.placeholder("b")]
    operands = (parts, ["none", "silu"], torch.int8)
    pair = graph.call_function(torch.ops.ditopt.quantize_rows.default, operands)
    graph.output((pair,))
    gm = fx.GraphModule({}, graph)
    (note,) = _inline_operators(gm)
    assert note.startswith("rounding kernels became")
    a, b = torch.randn(3, 4), torch.randn(3, 5)
    found: tuple[Tensor, Tensor] = gm(a, b)[0]
    for value, wanted in zip(
        found, reference.quantize_rows([a, b], ["none", "silu"], torch.int8), strict=True
    ):
        assert torch.equal(value, wanted)


def test_an_operator_that_only_our_library_has_is_refused_by_name() -> None:
    graph = fx.Graph()
    q = graph.placeholder("q")
    mass = torch.ops.ditopt.block_mass.default
    graph.output((graph.call_function(mass, (q,)),))
    message = r"^the operator ditopt\.block_mass\.default needs ditopt's library"
    with pytest.raises(EngineError, match=message):
        _inline_operators(fx.GraphModule({}, graph))


def package(folder: Path, code: bytes) -> Path:
    path = folder / "program.pt2"
    with zipfile.ZipFile(path, "w") as written:
        written.writestr("data/model.wrapper.so", code)
    return path


def test_a_program_with_a_c_library_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="standard library statically") as caught:
        _check_linkage(package(tmp_path, b"\x7fELF libtorch.so libc.so.6"))
    assert "CXX" in str(caught.value.remedy)


@pytest.mark.parametrize("code", [b"\x7fELF libstdc++.so.6", b"\x7fELF libc++.so.1", b"\xcf\xfa"])
def test_a_program_that_uses_the_process_s_library_is_taken(tmp_path: Path, code: bytes) -> None:
    _check_linkage(package(tmp_path, code))

"""Compile a canonical graph ahead of time into a native program: AOTInductor, `.pt2`.

ditopt's operators must not stay in it: a program runs where ditopt is not installed. Block-sparse
attention becomes FlexAttention or plain Triton, which Inductor compiles in; block selection becomes
its reference, which is ordinary PyTorch.
"""

from __future__ import annotations

import copy
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ditopt.backends import aoti_cpu
from ditopt.backends.examples import examples_of
from ditopt.backends.rows import rows_in_registers
from ditopt.errors import EngineError
from ditopt.graph import arguments, fake_value
from ditopt.passes.base import EXECUTOR

_CPP_LIBRARIES = (b"libstdc++.so", b"libc++.so")


class AotiExporter:
    """Native programs for torch's C++ and Python runtimes."""

    format = "pt2"
    suffix = ".pt2"
    holds_weights = False
    keeps_strides = True

    def available(self) -> str | None:
        """AOTInductor ships with torch; it says itself if it lacks a compiler."""
        return None

    def export(self, gm: fx.GraphModule, path: Path, options: Mapping[str, Any]) -> list[str]:
        """Compile `gm`, which stays as it is, and write the program.

        Args:
            gm: its placeholders are the program's arguments, tensors alone; sizes may be symbols.
            path: file to write.
            options: Inductor's own.

        Returns:
            What the program does by other means than the compiled model, in words.

        Raises:
            EngineError: an operator that only ditopt's library has.
        """
        gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        notes = _inline_operators(gm)
        configs = dict(options)
        if any(node.target is aoti_cpu.OPERATOR for node in gm.graph.nodes):
            configs["aot_inductor.custom_ops_to_c_shims"] = aoti_cpu.shims()
        examples, axes = examples_of(gm)
        # torch.export names inputs after the forward's parameters; `*args` keeps the order.
        program = _Positional(gm)
        with torch.no_grad(), warnings.catch_warnings(), rows_in_registers(configs) as patches:
            warnings.simplefilter("ignore")
            exported = torch.export.export(program, examples, dynamic_shapes=axes)
            exported = _without_dead_code(exported)
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(path), inductor_configs=patches
            )
        _check_linkage(path)
        return notes


def _check_linkage(path: Path) -> None:
    """A program has to use the process's C++ library: torch crashes on loading a second one.

    Raises:
        EngineError: the compiler linked the library statically.
    """
    with zipfile.ZipFile(path) as package:
        for name in package.namelist():
            code = package.read(name) if name.endswith(".so") else b""
            if code.startswith(b"\x7fELF") and not any(lib in code for lib in _CPP_LIBRARIES):
                raise EngineError(
                    "the C++ compiler linked its standard library statically into the program; "
                    "loading it would crash torch",
                    remedy="Let CXX name a compiler that links libstdc++.so.6 dynamically.",
                )


class _Positional(torch.nn.Module):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, *args: Any) -> Any:
        return self.gm(*args)


def _without_dead_code(program: Any) -> Any:
    program.graph_module.graph.eliminate_dead_code()
    return program


def _inline_operators(gm: fx.GraphModule) -> list[str]:
    """Put something that can be compiled in the place of each operator of ditopt's own."""
    notes: dict[str, None] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith("ditopt."):
            continue
        name = str(node.target).split(".")[1]
        if name == "block_sparse_attention" or name.startswith("block_sparse_attention_fa4"):
            executor, note = _attention(node)
            node.target = executor
            if note:
                notes[note] = None
        elif name == "select_blocks_pooled":
            from ditopt.kernels.block_selection import reference

            node.target = reference.select_pooled
        elif name == "quantize_rows":
            from ditopt.kernels.quantize_rows import reference as rounding

            node.target = rounding.quantize_rows
            notes["rounding kernels became what the compiler makes of the same operators"] = None
        elif name != "block_sparse_attention_triton":
            raise EngineError(
                f"the operator {node.target} needs ditopt's library where the engine runs",
                remedy="Leave it out of the plan, or use torch.compile.",
            )
    gm.recompile()
    return list(notes)


def _attention(node: fx.Node) -> tuple[Any, str | None]:
    from ditopt.kernels.block_sparse_attention import flex

    q, *_, block_q, block_k, _ = arguments(node)
    value = fake_value(q)
    wanted = node.meta.get(EXECUTOR)
    if value.is_cuda and wanted != "flex":
        from ditopt.kernels.block_sparse_attention import triton  # noqa: F401  (registers it)

        note = None if wanted == "triton" else f"{wanted or 'the operator'} became plain Triton"
        return torch.ops.ditopt.block_sparse_attention_triton.default, note
    if wanted in (None, "cpu") and aoti_cpu.reason_to_decline(node) is None:
        return aoti_cpu.OPERATOR, None
    declined = flex.reason_to_decline(value, block_q, block_k)
    if declined is not None:
        raise EngineError(f"block-sparse attention cannot be compiled in: {declined}")
    return flex.block_sparse_attention, None

"""For which sizes an exported graph is the model: its guards, tried over whole ranges."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ditopt.errors import EngineError
from ditopt.export.sizes import OpenSizes, Range
from ditopt.export.values import bind, names_of_inputs

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ditopt.export.recording import RecordedCall

_MOST_COMBINATIONS = 4096


def holds_for(
    model: torch.nn.Module, program: ExportedProgram, call: RecordedCall, sizes: OpenSizes
) -> OpenSizes:
    """The sizes with ranges in which every guard of the exported graph holds.

    A range shrinks around the example, one size at a time.

    Raises:
        EngineError: an axis was fixed to a number, or guards tie sizes to each other.
    """
    guards = _Guards(model, program, call, sizes)
    for name, own in sizes.axes.items():
        for axis, size in own.items():
            found = guards.shapes[name][axis]
            if not isinstance(found, torch.SymInt):
                raise EngineError(
                    f"{name}: torch.export fixes axis {axis} ({size}) to {int(found)}: the model "
                    "computes with it as with a number",
                    remedy=_remedy(size),
                )
    ranges = {name: _shrunk(guards, sizes, name) for name in sizes.ranges}
    every = product(*(found.values() for found in ranges.values()))
    for values in islice(every, _MOST_COMBINATIONS):
        together = dict(zip(ranges, values, strict=True))
        guard = guards.failing(together)
        if guard is not None:
            where = ", ".join(f"{name} {value}" for name, value in together.items())
            raise EngineError(
                f"the graph does not hold at {where}: it wants {guard}",
                remedy="Leave one of them out of --dynamic.",
            )
    return replace(sizes, ranges=ranges)


def _shrunk(guards: _Guards, sizes: OpenSizes, name: str) -> Range:
    tried, start = sizes.ranges[name], sizes.example[name]
    ends, guard = [], ""
    for order in (tried.values(), tried.values()[::-1]):
        good = start
        for value in order[order.index(start) :] if start in order else order:
            failing = guards.failing({**sizes.example, name: value})
            if failing is not None:
                guard = failing
                break
            good = value
        ends.append(good)
    if ends[0] == ends[1]:
        raise EngineError(
            f"the graph holds for {name} {start} only: it wants {guard}", remedy=_remedy(name)
        )
    return Range(ends[1], ends[0], tried.step)


def _remedy(size: str) -> str:
    return f"Leave {'batch' if size == 'batch' else 'resolution'} out of --dynamic."


class _Guards:
    """The conditions under which an exported graph is the model's."""

    def __init__(
        self,
        model: torch.nn.Module,
        program: ExportedProgram,
        call: RecordedCall,
        sizes: OpenSizes,
    ) -> None:
        from torch.export.graph_signature import InputKind

        self._axes = sizes.axes
        self._bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
        # torch's own text about its own graph, such as "(L['x'].size()[3] // 2) <= 32".
        texts = program._guards_code or []
        self._guards = [(text, compile(text, "<guard>", "eval")) for text in texts]
        placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        users = [s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        named = bind(inspect.signature(model.forward), call.args, call.kwargs)
        paths = names_of_inputs(call.args, call.kwargs, named)
        # Guards name an input by its argument, or by its place among all leaves.
        self._flat = list(
            zip(paths, pytree.tree_leaves((call.args, dict(call.kwargs))), strict=True)
        )
        self.shapes = {
            path: placeholders[spec.arg.name].meta["val"].shape
            for path, spec in zip(paths, users, strict=True)
            if path in sizes.axes
        }

    def failing(self, sizes: Mapping[str, int]) -> str | None:
        """The first guard that does not hold at these sizes, or None."""

        def shape_of(path: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            shape = list(value.shape)
            for axis, name in self._axes.get(path, {}).items():
                shape[axis] = sizes[name]
            return _Sized(tuple(shape))

        given = {name: _mapped(name, value, shape_of) for name, value in self._bound.items()}
        given["flat_args"] = [shape_of(path, value) for path, value in self._flat]
        for text, code in self._guards:
            if not _holds(code, given):
                return text.replace("L['", "").replace("']", "")
        return None


def _holds(code: Any, given: Mapping[str, Any]) -> bool:
    try:
        return bool(eval(code, {"L": given, "math": math, "torch": torch}))
    except (ArithmeticError, LookupError, NameError):  # divided by 0, or not readable: not proven
        return False


@dataclass(frozen=True)
class _Sized:
    shape: tuple[int, ...]

    def size(self) -> tuple[int, ...]:
        return self.shape


def _mapped(path: str, value: Any, function: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _mapped(f"{path}.{key}", v, function) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(f"{path}.{k}", v, function) for k, v in enumerate(value)]
    return function(path, value)

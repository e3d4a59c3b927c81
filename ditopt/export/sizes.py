"""Sizes that an engine leaves open: which axes of the inputs, and in which ranges.

`batch` is the first axis of the latents and of every other input that is as long there;
`resolution` are the last two axes of latents [B, C, (F,) H, W], or the token axis of packed ones
[B, N, C] and of every other input that is as long (position ids). torch.export finds out what these
axes mean to the graph: one that it fixes to a number is refused by the input's name, and so is a
range in which one of its guards does not hold (`guards`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ditopt.errors import EngineError
from ditopt.export.values import bind, leaves

if TYPE_CHECKING:
    from ditopt.export.recording import RecordedCall

WHAT = ("batch", "resolution")

_LARGEST_STEP = 8
_LARGEST_BATCH = 8

Axes = Mapping[str, Mapping[int, str]]
"""Name of the size on each open axis, by input."""


@dataclass(frozen=True)
class Range:
    """Values of one size: `least`, `least + step`, ... up to `most`."""

    least: int
    most: int
    step: int = 1

    def values(self) -> range:
        """All of them."""
        return range(self.least, self.most + 1, self.step)


@dataclass(frozen=True)
class OpenSizes:
    """What is left open.

    Attributes:
        axes: the axes of each input.
        ranges: by the size's name.
        example: the sizes that the engine is exported and compiled with.
        recorded: the sizes of the sampling loop.
    """

    axes: Axes
    ranges: Mapping[str, Range]
    example: Mapping[str, int]
    recorded: Mapping[str, int]

    def checked(self) -> list[dict[str, int]]:
        """Sizes to compare the engine at: all least, all at least two steps above it."""
        least = {name: r.least for name, r in self.ranges.items()}
        above = {n: r.values()[min(2, len(r.values()) - 1)] for n, r in self.ranges.items()}
        known = (self.recorded, self.example)
        unique = {tuple(sorted(s.items())): s for s in (least, above) if s not in known}
        return list(unique.values())


def parse(text: str) -> tuple[str, ...]:
    """`batch`, `resolution` or both, with a comma.

    Raises:
        EngineError: anything else.
    """
    wanted = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in wanted:
        if name not in WHAT:
            raise EngineError(f"--dynamic: expected batch, resolution or both, got {name!r}")
    return wanted


def find(model: torch.nn.Module, calls: Sequence[RecordedCall], wanted: Sequence[str]) -> OpenSizes:
    """The open axes of a model, with the ranges that are tried by default.

    Args:
        model: its forward names the inputs.
        calls: of one loop; the latents are the first input of three axes that changes between them.
        wanted: of `WHAT`.

    Raises:
        EngineError: there are no latents of a known layout.
    """
    signature = inspect.signature(model.forward)
    named = bind(signature, calls[0].args, calls[0].kwargs)
    later = bind(signature, calls[-1].args, calls[-1].kwargs)
    main = _latents(named, later)
    latents: Tensor = named[main]
    axes: dict[str, dict[int, str]] = {}
    recorded: dict[str, int] = {}
    for name, value in named.items():
        own = dict(_axes(value, latents, wanted, is_main=name == main))
        if own:
            axes[name] = own
        recorded |= {size: value.shape[axis] for axis, size in own.items()}
    if "resolution" in wanted and latents.ndim not in (3, 4, 5):
        raise EngineError(
            f"{main}: latents of {latents.ndim} axes, expected [B, C, H, W], [B, C, F, H, W] or "
            "[B, N, C]",
            remedy="Leave resolution out of --dynamic.",
        )
    ranges = {name: _default_range(name, size) for name, size in recorded.items()}
    # torch.export takes a size of 1 for a constant.
    example = {name: max(2, size) for name, size in recorded.items()}
    return OpenSizes(axes, ranges, example, recorded)


def _latents(named: Mapping[str, Any], later: Mapping[str, Any]) -> str:
    """The first input of three axes or more that changes from call to call, or of all."""
    tensors = {n: v for n, v in named.items() if isinstance(v, Tensor) and v.ndim >= 3}
    moving = [n for n, v in tensors.items() if n in later and not torch.equal(v, later[n])]
    found = next(iter(moving or tensors), None)
    if found is None:
        raise EngineError("no input has three axes or more, so there are no latents to resize")
    return found


def _axes(
    value: Any, latents: Tensor, wanted: Sequence[str], *, is_main: bool
) -> Iterator[tuple[int, str]]:
    if not isinstance(value, Tensor):
        return
    if "batch" in wanted and value.ndim and value.shape[0] == latents.shape[0]:
        yield 0, "batch"
    if "resolution" not in wanted:
        return
    if latents.ndim == 3:
        for axis, size in enumerate(value.shape[:-1] if value.ndim > 1 else ()):
            if size == latents.shape[1] and (axis or value.shape[0] != latents.shape[0]):
                yield axis, "tokens"
    elif is_main:
        yield value.ndim - 2, "height"
        yield value.ndim - 1, "width"


def _default_range(name: str, size: int) -> Range:
    if name == "batch":
        return Range(1, max(_LARGEST_BATCH, 2 * size))
    step = next(s for s in (_LARGEST_STEP, 4, 2, 1) if size % s == 0 and (2 * s <= size or s == 1))
    half = max(step, size // 2 // step * step)
    return Range(half, 2 * size, step)


def resized(
    model: torch.nn.Module, call: RecordedCall, axes: Axes, sizes: Mapping[str, int]
) -> RecordedCall:
    """The call with other sizes: values along an axis start again, or end early; with its result.

    Raises:
        EngineError: the model cannot be called with these sizes.
    """
    from ditopt.export.recording import RecordedCall

    named = bind(inspect.signature(model.forward), call.args, call.kwargs)
    by_id = {id(named[name]): own for name, own in axes.items()}

    def resize(value: Any) -> Any:
        for axis, name in by_id.get(id(value), {}).items():
            index = torch.arange(sizes[name], device=value.device) % value.shape[axis]
            value = value.index_select(axis, index)
        return value

    args, kwargs = pytree.tree_map(resize, (call.args, dict(call.kwargs)))
    try:
        with torch.no_grad():
            result = model(*args, **kwargs)
    except Exception as error:  # whatever a model raises at a size that it was not made for
        lines = str(error).strip().splitlines() or [type(error).__name__]
        where = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise EngineError(f"the model fails at {where}: {lines[0][:200]}") from error
    return RecordedCall(args, kwargs, result)


def dynamic_shapes(model: torch.nn.Module, call: RecordedCall, axes: Axes) -> dict[str, Any]:
    """What torch.export is told about the arguments of a call.

    Raises:
        EngineError: the forward takes a variable number of arguments.
    """
    from torch.export import Dim

    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    for name in bound.arguments:
        if bound.signature.parameters[name].kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            raise EngineError(f"{name}: open sizes need a forward with named arguments")
    open_axes = {
        id(value): dict.fromkeys(axes[path], Dim.AUTO)
        for name, argument in bound.arguments.items()
        for path, value in leaves(name, argument)
        if path in axes
    }

    def told(value: Any) -> Any:
        return open_axes.get(id(value)) if isinstance(value, Tensor) else None

    return {name: pytree.tree_map(told, value) for name, value in bound.arguments.items()}

"""Arguments and results of a denoiser as named leaves, and the signature that binds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ditopt.errors import EngineError

Leaf = Any


def leaves(name: str, value: Any) -> Iterator[tuple[str, Leaf]]:
    """Each leaf of a nested argument under its path (`added_cond_kwargs.resolution`)."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from leaves(f"{name}.{key}" if name else str(key), member)
    elif isinstance(value, list | tuple):
        for position, member in enumerate(value):
            yield from leaves(f"{name}.{position}" if name else str(position), member)
    else:
        yield name, value


def bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Leaf]:
    """Every leaf of a call under its name in the signature; arguments left out take defaults.

    Raises:
        EngineError: the arguments do not fit the signature.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise EngineError(f"the call does not fit the model's signature: {error}") from None
    bound.apply_defaults()
    named: dict[str, Leaf] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        prefix = "" if kind is inspect.Parameter.VAR_KEYWORD else name
        named.update(leaves(prefix, value))
    return named


def names_of_inputs(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], named: Mapping[str, Leaf]
) -> list[str]:
    """The name of each leaf in the order in which torch.export flattens the arguments.

    Args:
        args: of a call.
        kwargs: of the call.
        named: what `bind` makes of them; what is no tensor has the empty name here.
    """
    from torch.utils import _pytree as pytree

    by_id: dict[int, list[str]] = {}
    for name, value in named.items():
        if isinstance(value, Tensor):
            by_id.setdefault(id(value), []).append(name)
    names = []
    for value in pytree.tree_leaves((args, dict(kwargs))):
        # Equal objects are the same input twice: each gets a name of its own, in order.
        found = by_id.get(id(value), [])
        names.append((found.pop(0) if len(found) > 1 else found[0]) if found else "")
    return names


def is_plain(value: Any) -> bool:
    """Whether a value can be written down: None, a truth value, a number, a text."""
    return value is None or isinstance(value, bool | int | float | str)


Structure = Any
"""JSON form of a result's shape: "tensor", null, or [kind, [[key, structure], ...]]."""


def describe_result(value: Any) -> tuple[Structure, list[Tensor]]:
    """The structure of a model's result and its tensors in order.

    Raises:
        EngineError: it holds something that is neither tensor nor None.
    """
    found: list[Tensor] = []

    def walk(part: Any, path: str) -> Structure:
        if isinstance(part, Tensor):
            found.append(part)
            return "tensor"
        if part is None:
            return None
        if isinstance(part, Mapping):  # diffusers' outputs are mappings too
            kind = "mapping"
            members = [[str(key), walk(v, f"{path}.{key}")] for key, v in part.items()]
        elif isinstance(part, list | tuple):
            kind = "list" if isinstance(part, list) else "tuple"
            members = [["", walk(v, f"{path}.{k}")] for k, v in enumerate(part)]
        else:
            raise EngineError(
                f"the model returns {type(part).__name__} at {path}; "
                "an engine returns tensors in tuples, lists and mappings"
            )
        return [kind, members]

    return walk(value, "result"), found


class Result(dict[str, Any]):
    """A mapping of results whose members are attributes too, as in diffusers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order."""
        return tuple(self.values())


def rebuild(structure: Structure) -> Callable[[list[Any]], Any]:
    """A function from the tensors in order to a result of that structure."""

    def build(part: Structure, values: Iterator[Any]) -> Any:
        if part is None:
            return None
        if part == "tensor":
            return next(values)
        kind, members = part
        built = [(key, build(member, values)) for key, member in members]
        if kind == "mapping":
            return Result(built)
        items = [value for _, value in built]
        return items if kind == "list" else tuple(items)

    return lambda values: build(structure, iter(values))

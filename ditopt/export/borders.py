"""What crosses the border of a program."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx

from ditopt.errors import EngineError
from ditopt.export.schema import TensorSpec
from ditopt.graph import fake_value, output_nodes, placeholders


def specs_of(gm: fx.GraphModule) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What a program takes and gives.

    Raises:
        EngineError: something else than a tensor crosses its border.
    """
    both = ([fake_value(n) for n in placeholders(gm)], [_value(n) for n in output_nodes(gm)])
    for value in (*both[0], *both[1]):
        if not isinstance(value, Tensor):
            raise EngineError(f"a {type(value).__name__} crosses the border of a program")
    return tuple(map(TensorSpec.of, both[0])), tuple(map(TensorSpec.of, both[1]))


def without_unused_inputs(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy without the weights that a pass has merged: they are not stored twice."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for node in placeholders(copied):
        if not node.users:
            copied.graph.erase_node(node)
    copied.recompile()
    return copied


def _value(node: Any) -> Any:
    return fake_value(node) if isinstance(node, fx.Node) else node

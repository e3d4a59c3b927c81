"""Which inputs of a call each value of a captured model depends on.

Data flow only: the canonical graph is functional, so nothing reaches a value but through its
operands. Sets of inputs are bit masks, bit k for slot k of the environment; weights are no inputs
of a call. Blocks that share a body are treated alike, so that they go on sharing it: what one of
them gets from the latents counts as dependent on the latents in all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ditopt.graph import fake_value, free_symbols, output_nodes, placeholders, target_name

if TYPE_CHECKING:
    from ditopt.capture import Captured

aten = torch.ops.aten

_SIZES = {"aten.sym_size", "aten.sym_stride", "aten.sym_numel", "aten.sym_storage_offset"}


@dataclass(frozen=True)
class Dependence:
    """The result of `find_dependence`.

    Attributes:
        slots: for each slot the mask of inputs that its value depends on.
        nodes: by body key, the mask of each node of the body.
        unknown: the bit of values that no set of inputs determines: random ones, those with an
            effect, and those of slots that were declared opaque.
    """

    slots: tuple[int, ...]
    nodes: Mapping[str, Mapping[fx.Node, int]]
    unknown: int


def find_dependence(captured: Captured, opaque: Collection[int] = ()) -> Dependence:
    """Dependence of every slot and node.

    Args:
        captured: the model.
        opaque: slots whose values may come from elsewhere (forecasts).
    """
    unknown = 1 << captured.slots
    slots = [0] * captured.slots
    for slot, item in enumerate(captured.inputs):
        if item.role == "user":
            slots[slot] = 1 << slot
    for slot in opaque:
        slots[slot] = unknown
    symbols = {
        name
        for item in captured.inputs
        if item.role == "symbol"
        for name in free_symbols(item.fake)
    }
    given: dict[str, list[int]] = {}
    nodes: dict[str, dict[fx.Node, int]] = {}
    changed = True
    while changed:  # masks only grow: blocks that share a body pass theirs on to each other
        changed = False
        for piece in captured.pieces:
            key, gm = piece.body.key, piece.body.gm
            old = given.get(key, [])
            masks = [slots[slot] for slot in piece.inputs]
            if old:
                masks = [a | b for a, b in zip(old, masks, strict=True)]
            if masks != old:
                given[key] = masks
                nodes[key] = _node_masks(gm, masks, symbols, unknown)
            for slot, value in zip(piece.outputs, output_nodes(gm), strict=True):
                mask = slots[slot] | (nodes[key][value] if isinstance(value, fx.Node) else 0)
                changed |= mask != slots[slot]
                slots[slot] = mask
    return Dependence(tuple(slots), nodes, unknown)


def _node_masks(
    gm: fx.GraphModule, given: Sequence[int], symbols: set[str], unknown: int
) -> dict[fx.Node, int]:
    masks = dict(zip(placeholders(gm), given, strict=True))
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if is_size(node) and free_symbols(fake_value(node)) <= symbols:
            masks[node] = 0
            continue
        certain = not (_uncertain(node) or _is_read_value(node))
        # A size that follows from values must stay in the program that makes it.
        mask = 0 if certain and free_symbols(fake_value(node)) <= symbols else unknown
        for source in value_inputs(node):
            mask |= masks[source]
        masks[node] = mask
    return masks


def is_size(node: fx.Node) -> bool:
    """Whether a node reads a tensor's shape and not its values."""
    return target_name(node.target).rsplit(".", 1)[0] in _SIZES


def only_casts(node: fx.Node) -> bool:
    """Whether a node is a `type_as` that reads no more than the dtype of its second operand."""
    if node.target is not aten.type_as.default:
        return False
    source, like = node.all_input_nodes[0], node.all_input_nodes[-1]
    return bool(fake_value(source).device == fake_value(like).device)


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The operands that a value depends on."""
    return node.all_input_nodes[:1] if only_casts(node) else node.all_input_nodes


def value_users(node: fx.Node) -> list[fx.Node]:
    """The readers whose result depends on a value."""
    return [user for user in node.users if node in value_inputs(user)]


def _is_read_value(node: fx.Node) -> bool:
    """Whether a node makes a number from a tensor's values (`item`)."""
    if isinstance(fake_value(node), (torch.Tensor, tuple, list, type(None))):
        return False
    return any(isinstance(fake_value(source), torch.Tensor) for source in node.all_input_nodes)


def _uncertain(node: fx.Node) -> bool:
    """Whether equal operands may give another result, or the node does more than give one."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    schema = target._schema
    if not schema.returns or schema.is_mutable:
        return True
    return torch.Tag.nondeterministic_seeded in target.tags and _draws(node)


def _draws(node: fx.Node) -> bool:
    """Whether an operator that can draw random numbers does so here."""
    if node.target is aten.dropout.default:
        return bool(_argument(node, 1, "p")) and bool(_argument(node, 2, "train"))
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(_argument(node, 4, "dropout_p"))
    return True


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)

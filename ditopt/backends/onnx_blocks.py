"""Block-sparse attention with constant lists as dense attention on gathered tokens: exact.

Query blocks of a head that keep the same key blocks are one group; heads with the same lists are
one class. A group is dense attention of its queries to its keys, and groups of equal sizes are one
batch (attention.md, Appendix A8: frame-local heads, temporal tubes and tiled windows are the cases
where this is a permutation). Work is that of the kept pairs, as in a block-sparse kernel; what
stands in the graph is Gather, Attention, Concat.

Lists that are computed, and patterns whose rows fall into too many sizes, stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.graph import arguments, attribute, fake_value
from ditopt.symbols import is_symbolic

aten = torch.ops.aten

MOST_BATCHES = 12
"""Of one class of heads: each is an attention of its own in the graph."""

MOST_INDICES = 1 << 22
"""Of one attention: they are constants of the model, 8 bytes each."""

_Index = list[list[int]]
"""Tokens of each group."""


@dataclass(frozen=True)
class _Batch:
    """Groups of equal sizes: tokens of their queries [groups, n] and of their keys [groups, m]."""

    queries: _Index
    keys: _Index


_Class = tuple[list[int], list[_Batch]]
"""Heads with equal lists, and what these say."""


def gather_blocks(gm: fx.GraphModule) -> tuple[int, int]:
    """Rewrite each block-sparse attention of `gm` that allows it.

    Returns:
        How many were rewritten, and how many are left.
    """
    done = left = 0
    for node in list(gm.graph.nodes):
        if str(node.target) != "ditopt.block_sparse_attention.default":
            continue
        q, k, v, counts, ids, block_q, block_k, scale = arguments(node)
        lists = _constant(gm, counts), _constant(gm, ids)
        n_q, n_k = fake_value(q).shape[2], fake_value(k).shape[2]
        classes = None
        if lists[0] is not None and lists[1] is not None and not is_symbolic(n_q):
            classes = _classes(lists[0], lists[1], (n_q, n_k), (block_q, block_k))
        if classes is None:
            left += 1
            continue
        done += 1
        with gm.graph.inserting_before(node):
            structure = _written(gm, classes, fake_value(q).shape[1], n_q, n_k)
            call = gm.graph.call_function(gathered_attention, (q, k, v, structure, scale))
        call.meta["val"] = fake_value(node)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    return done, left


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, structure: Any, scale: float) -> Tensor:
    """Attention of each group to its keys, put back in place.

    Args:
        q: [B, H, N_q, D].
        k: [B, H, N_k, D].
        v: as k.
        structure: for each class of heads their numbers, batches (queries [G, n], keys [G, m] or
            None for no key) and the places of the tokens in these; then the places of the heads.
            None wherever nothing is to be moved.
        scale: of the scores.
    """
    classes, head_places = structure
    parts = []
    for heads, batches, places in classes:
        own = (_moved(q, 1, heads), _moved(k, 1, heads), _moved(v, 1, heads))
        rows = [_attend(*own, queries, keys, scale) for queries, keys in batches]
        parts.append(_moved(torch.cat(rows, 2), 2, places))
    return _moved(torch.cat(parts, 1), 1, head_places)


def _moved(x: Tensor, dim: int, places: Tensor | None) -> Tensor:
    return x if places is None else x.index_select(dim, places)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, keys: Any, scale: float
) -> Tensor:
    """[B, h, G * n, D]: the groups of one batch, one after the other."""
    batch, heads, tokens, channels = q.shape
    if keys == "none":  # attention to no key gives zeros
        count = tokens if queries is None else queries.numel()
        return q.new_zeros(batch, heads, count, channels)

    def gather(x: Tensor, index: Tensor | None) -> Tensor:
        if index is None:
            return x
        chosen = x.index_select(2, index.reshape(-1))
        return chosen.reshape(batch, heads * index.shape[0], index.shape[1], channels)

    operands = (gather(q, queries), gather(k, keys), gather(v, keys))
    out = torch.nn.functional.scaled_dot_product_attention(*operands, scale=scale)
    return out.reshape(batch, heads, -1, channels)


def _classes(
    counts: Tensor, ids: Tensor, tokens: tuple[int, int], blocks: tuple[int, int]
) -> list[_Class] | None:
    """Heads with equal lists, and their groups by size; None where that does not pay."""
    if counts.shape[0] != 1:
        return None
    by_lists: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
    for head, (own_counts, own_ids) in enumerate(zip(counts[0], ids[0], strict=True)):
        lists = zip(own_ids.tolist(), own_counts.tolist(), strict=True)
        by_lists[tuple(tuple(row[:count]) for row, count in lists)].append(head)
    classes = [(heads, _batches(rows, tokens, blocks)) for rows, heads in by_lists.items()]
    indices = sum(len(g) for _, bs in classes for b in bs for g in (*b.queries, *b.keys))
    if max(len(batches) for _, batches in classes) > MOST_BATCHES or indices > MOST_INDICES:
        return None
    return classes


def _batches(
    rows: Sequence[tuple[int, ...]], tokens: tuple[int, int], blocks: tuple[int, int]
) -> list[_Batch]:
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for block, keys in enumerate(rows):
        groups[keys].append(block)
    by_size: dict[tuple[int, int], _Batch] = {}
    for kept, members in groups.items():
        group = _tokens(members, blocks[0], tokens[0]), _tokens(kept, blocks[1], tokens[1])
        batch = by_size.setdefault((len(group[0]), len(group[1])), _Batch([], []))
        batch.queries.append(group[0])
        batch.keys.append(group[1])
    return list(by_size.values())


def _tokens(members: Sequence[int], block: int, end: int) -> list[int]:
    return [t for b in members for t in range(b * block, min((b + 1) * block, end))]


def _written(gm: fx.GraphModule, classes: Sequence[_Class], heads: int, n_q: int, n_k: int) -> Any:
    """The structure that `gathered_attention` reads, its indices as constants of the model."""

    def groups(index: _Index, count: int) -> Any:
        if not index[0]:
            return "none"
        return None if index == [list(range(count))] else _constant_node(gm, index)

    def places(order: Sequence[int]) -> fx.Node | None:
        """Where each of 0, 1, ... stands in `order`."""
        if list(order) == list(range(len(order))):
            return None
        return _constant_node(gm, sorted(range(len(order)), key=order.__getitem__))

    written = []
    for own, batches in classes:
        order = [token for batch in batches for group in batch.queries for token in group]
        both = [(groups(batch.queries, n_q), groups(batch.keys, n_k)) for batch in batches]
        chosen = None if own == list(range(heads)) else _constant_node(gm, own)
        written.append((chosen, both, places(order)))
    return written, places([head for own, _ in classes for head in own])


def _constant_node(gm: fx.GraphModule, values: Any) -> fx.Node:
    value = torch.tensor(values, dtype=torch.int64)
    number = sum(key.startswith("index_") for key, _ in gm.named_buffers())
    gm.register_buffer(f"index_{number}", value)
    node = gm.graph.get_attr(f"index_{number}")
    node.meta["val"] = value
    return node


def _constant(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a node that depends on the model's own tensors alone."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        value: Tensor = attribute(gm, str(node.target))
        return value.cpu()
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    known: dict[fx.Node, Tensor] = {}
    for source in node.all_input_nodes:
        found = _constant(gm, source)
        if found is None:
            return None
        known[source] = found
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    result = node.target(*args, **kwargs)
    return result if isinstance(result, Tensor) else None

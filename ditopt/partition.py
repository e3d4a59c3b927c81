"""Cut a Dynamo graph into prefix, blocks, glue and suffix by the shape of its module paths.

A *block* is the work of one child of an indexed container (`blocks.3`, `transformer_blocks.0`). A
container counts when a member holds an attention, or when it has several members with linear layers
of their own, so that lists inside a block (`ff.net.0`) and small heads (`adaLN.1`) do not. Names of
containers are never looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ditopt.graph import module_paths, target_name

if TYPE_CHECKING:
    from torch import fx

PieceKind = Literal["prefix", "block", "glue", "suffix", "whole"]

_INDEXED = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_ATTENTION = ("scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward")
_MATMUL = ("linear", "matmul", "bmm", "conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Run:
    """Consecutive nodes of one part of the model; `path` is the block's name, or empty."""

    kind: PieceKind
    path: str
    nodes: tuple[fx.Node, ...]


def is_attention(node: fx.Node) -> bool:
    """Whether a Dynamo or ATen node computes softmax attention."""
    name = target_name(node.target)
    return node.op in ("call_function", "call_method") and any(part in name for part in _ATTENTION)


def is_matmul(node: fx.Node) -> bool:
    """Whether a node multiplies matrices (linear layers, matmul, convolutions)."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = target_name(node.target)
    parts = re.split(r"[.:]", name)
    return any(part in _MATMUL for part in parts)


def block_path(node: fx.Node) -> str:
    """The outermost indexed module path around `node` (`blocks.3`), or the empty string."""
    for path in module_paths(node):
        match = _INDEXED.match("." + path)
        if match:
            return match.group(1)[1:]
    return ""


def _container(path: str) -> str:
    return path.rsplit(".", 1)[0]


def _block_containers(labels: dict[fx.Node, str]) -> set[str]:
    """Containers whose members are blocks of the model."""
    attention: set[str] = set()
    linears: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for node, path in labels.items():
        if not path:
            continue
        if is_attention(node):
            attention.add(_container(path))
        linears[_container(path)][path] += is_matmul(node)
    repeated = {
        name
        for name, members in linears.items()
        if len(members) >= 2 and all(count >= 2 for count in members.values())
    }
    return attention | repeated


def _runs(nodes: Sequence[fx.Node], labels: dict[fx.Node, str]) -> list[tuple[str, list[fx.Node]]]:
    runs: list[tuple[str, list[fx.Node]]] = []
    for node in nodes:
        if runs and runs[-1][0] == labels[node]:
            runs[-1][1].append(node)
        else:
            runs.append((labels[node], [node]))
    return runs


def _absorb_islands(runs: list[tuple[str, list[fx.Node]]]) -> list[tuple[str, list[fx.Node]]]:
    """Join unlabelled nodes that lie between two runs of the same block to that block."""
    merged: list[tuple[str, list[fx.Node]]] = []
    for path, nodes in runs:
        island = len(merged) >= 2 and path and merged[-1][0] == "" and merged[-2][0] == path
        if island:
            _, between = merged.pop()
            merged[-1][1].extend(between)
            merged[-1][1].extend(nodes)
        else:
            merged.append((path, list(nodes)))
    return merged


def partition(nodes: Sequence[fx.Node]) -> list[Run]:
    """Split call nodes, in program order, into runs.

    Each block keeps its largest run only: a model may call a part of a block again later (DiT's
    last layer reads the first block's embedding), and that is not the block.
    """
    labels = {node: block_path(node) for node in nodes}
    containers = _block_containers(labels)
    labels = {n: p if p and _container(p) in containers else "" for n, p in labels.items()}
    runs = _absorb_islands(_runs(nodes, labels))

    largest: dict[str, int] = {}
    for k, (path, members) in enumerate(runs):
        if path and (path not in largest or len(members) > len(runs[largest[path]][1])):
            largest[path] = k
    kept = set(largest.values())
    for k, (path, members) in enumerate(runs):
        if path and k not in kept:
            for node in members:
                labels[node] = ""
        elif path:
            for node in members:
                labels[node] = path
    runs = _runs(nodes, labels)
    if not any(path for path, _ in runs):
        return [Run("whole", "", tuple(nodes))] if nodes else []

    first = next(k for k, (path, _) in enumerate(runs) if path)
    last = max(k for k, (path, _) in enumerate(runs) if path)
    result = []
    for k, (path, members) in enumerate(runs):
        kind: PieceKind = (
            "block" if path else "prefix" if k < first else "suffix" if k > last else "glue"
        )
        result.append(Run(kind, path, tuple(members)))
    return result

"""What a pass is, and how it hands further inputs to the program that it rewrites.

A pass works on one canonical body. Blocks that share the body share the rewrite, so what differs
between them (block lists, fused weights) becomes a further input of the graph: a placeholder whose
`meta["ditopt"]` says how the runtime fills it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from torch import fx

    from ditopt.config import Options
    from ditopt.quantization import LinearRule


EXECUTOR = "ditopt_executor"
"""Key in a node's meta: the executor that a backend is to lower a block-sparse attention to."""


LAUNCH_OF = "ditopt_launch_of"
"""Key in a block-sparse attention's meta: the attention whose lists it reads, where none of its
inputs says so."""


MEMBERS = "ditopt_members"
"""Key in a linear node's meta: names of the layers that were merged into it."""


@dataclass(frozen=True)
class FusedWeight:
    """Several weights in one: the graph's inputs at `positions`, concatenated on axis 0."""

    positions: tuple[int, ...]


@dataclass(frozen=True)
class BlockLists:
    """One of the two block lists of the attention at `node`: `part` is 0 for counts, 1 for ids."""

    node: str
    part: int


@dataclass(frozen=True)
class ForcedBlocks:
    """The blocks that the selector of the attention at `node` keeps whatever they score."""

    node: str


@dataclass(frozen=True)
class SelectorSlot:
    """A number, on the CPU, that tells the selector at `node` from all others."""

    node: str


@dataclass(frozen=True)
class PlaceOrder:
    """The tokens of the attention at `node` place by place, all frames of each."""

    node: str


@dataclass(frozen=True)
class DroppedBlocks:
    """Which blocks are on no list of the attention at `node`, as bits."""

    node: str


@dataclass(frozen=True)
class BlockBias:
    """How many tokens each key block of the attention at `node` has, as logarithms."""

    node: str


@dataclass(frozen=True)
class TokenPermutation:
    """The order of tokens, or its inverse, in the sequence of the attention at `node`."""

    node: str
    inverse: bool


@dataclass(frozen=True)
class RemainderProjection:
    """The plan's projection of the linear part at the attention `node`, in `dtype`."""

    node: str
    dtype: torch.dtype


@dataclass(frozen=True)
class LinearOperand:
    """A tensor that a quantized layer reads in place of its weight: see `quantization.layer`.

    Attributes:
        node: the layer, whose input's statistics its transform takes; the first where several are
            merged.
        rule: of the plan.
        weights, biases: the graph's inputs that it is made from, one below the other.
        name: one of `quantization.layer.operands`.
    """

    node: str
    rule: LinearRule
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class NodeDecision:
    """A decision about a node of a body; it is repeated for each block that shares the body."""

    node: str
    applied: bool
    reason: str


@dataclass(frozen=True)
class SparseChoice:
    """What the plan says at one attention node: block sizes, and how many heads it names.

    `executor` is the one to lower to (empty: the backend's choice); `dense_heads` need no lists.
    """

    block_q: int
    block_k: int
    heads: int
    tokens_q: Any
    tokens_k: Any
    executor: str = ""
    dense_heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class OnlineChoice:
    """How the attention at a node chooses its blocks: see `kernels.block_selection`.

    `scores` are `pooled` or `mass`; a choice serves `refresh` computed steps.
    """

    rule: str
    amount: float
    minimum: int
    block_q: int
    block_k: int
    heads: int
    tokens_q: Any
    tokens_k: Any
    executor: str = ""
    scores: str = "pooled"
    refresh: int = 1


@dataclass(frozen=True)
class ClusterChoice:
    """How the attention at a node groups its tokens: `kernels.block_selection.clusters`.

    `clusters` of queries and of keys, `iterations` in a run's first step and later ones; `text`
    counts the tokens of its sequence that are not of the grid.
    """

    block_q: int
    block_k: int
    heads: int
    clusters: tuple[int, int]
    iterations: tuple[int, int]
    mass: float
    least: float
    text: Any
    executor: str = ""


@dataclass(frozen=True)
class VoteChoice:
    """How many queries of the attention at a node vote for an order of its tokens.

    See `kernels.block_selection.ops_orders`.
    """

    block_q: int
    block_k: int
    heads: int
    samples: int
    tokens_q: Any
    tokens_k: Any
    executor: str = ""


@dataclass(frozen=True)
class HierarchicalChoice:
    """How the attention at a node searches its blocks: see `kernels.hierarchical_attention`.

    `text` counts the tokens of its sequence that are not of the grid.
    """

    top_k: int
    coarse: bool
    heads: int
    tokens: Any
    text: Any


@dataclass(frozen=True)
class RemainderChoice:
    """Linear attention on what a sparse attention leaves out: features, shape of the projection."""

    phi: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ArithmeticChoice:
    """8-bit products of an attention: `kind` as in a plan's rule, simulated where that is allowed.

    `listed`: of the blocks on the site's lists; else of all, in blocks of these sizes.
    """

    kind: str
    simulate: bool
    block_q: int
    block_k: int
    listed: bool


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the graph.

    Attributes:
        options: of the `torch.compile` call.
        sparse: attention nodes for which the plan asks for block-sparse attention.
        online: attention nodes that choose their blocks from the data.
        orders: attention nodes at which each head chooses the order of its tokens as well.
        hierarchical: attention nodes that choose theirs by a search from coarse to fine.
        reordered: attention nodes that put their tokens into the plan's order, and why they do so
            one by one.
        declined: attention nodes for which it asks in vain, with the reason.
        means: attention nodes at which the mean of each block that is left out stands for it.
        remainders: attention nodes that add linear attention on what they leave out.
        arithmetic: attention nodes that multiply in 8 bits.
        linear: linear nodes with their rule, or the reason why it cannot be followed.
        own: positions of the inputs that are the model's own tensors; only these last from call to
            call, so only of these may the runtime keep something derived.
    """

    options: Options
    sparse: Mapping[str, SparseChoice] = field(default_factory=dict)
    online: Mapping[str, OnlineChoice] = field(default_factory=dict)
    orders: Mapping[str, ClusterChoice | VoteChoice] = field(default_factory=dict)
    hierarchical: Mapping[str, HierarchicalChoice] = field(default_factory=dict)
    reordered: Mapping[str, str] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)
    means: frozenset[str] = frozenset()
    remainders: Mapping[str, RemainderChoice] = field(default_factory=dict)
    arithmetic: Mapping[str, ArithmeticChoice] = field(default_factory=dict)
    linear: Mapping[str, LinearRule | str] = field(default_factory=dict)
    own: frozenset[int] = frozenset()


class Pass(Protocol):
    """One rewrite.

    Attributes:
        name: snake_case, equal to the file name.
        after: passes that must come earlier.
    """

    name: str
    after: frozenset[str]

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Rewrite `gm` in place and say what was done, and what was not and why."""


def add_input(gm: fx.GraphModule, name: str, fake: Any, spec: Any) -> fx.Node:
    """A further placeholder after the existing ones, which the runtime fills as `spec` says."""
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    node.meta["val"] = fake
    node.meta["ditopt"] = spec
    return node


def add_slot(gm: fx.GraphModule, site: str, like: Any) -> fx.Node:
    """A further placeholder for the number of the selector at `site`; `like` is a fake tensor."""
    fake = like.new_empty((), dtype=torch.int64, device="cpu")
    return add_input(gm, f"{site}_slot", fake, SelectorSlot(site))

"""Compile canonical graphs with Inductor, in the fake mode and with the symbols of the capture.

ditopt's block-sparse operator becomes the executor that was chosen for it (by measured cost, see
`kernels.block_sparse_attention.dispatch`): FlexAttention and plain Triton, which Inductor sees
through, FlashAttention-4, or the operator itself with the kernel that it has for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from ditopt.executors import UNKNOWN_DENSITY, device_name
from ditopt.graph import arguments, fake_value, placeholders
from ditopt.kernels.block_sparse_attention import dispatch
from ditopt.passes.base import EXECUTOR
from ditopt.symbols import hint

if TYPE_CHECKING:
    from ditopt.backends.base import Lowered


class InductorBackend:
    """Inductor for everything."""

    name = "inductor"
    fuses = True

    def available(self) -> str | None:
        """Inductor ships with torch; it says itself, when it compiles, if it lacks a compiler."""
        return None

    def supports(self, node: fx.Node) -> str | None:
        """Every node: what Inductor has no lowering for, it calls."""
        return None

    def lower(self, gm: fx.GraphModule, options: Mapping[str, Any]) -> Lowered:
        """Compile for the recorded shapes; `options` are Inductor's own."""
        from torch._guards import TracingContext, detect_fake_mode, tracing
        from torch._inductor.compile_fx import compile_fx

        gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        _use_executors(gm)
        examples = [fake_value(node) for node in placeholders(gm)]
        with torch.no_grad(), tracing(TracingContext(detect_fake_mode(examples))):
            lowered = compile_fx(gm, examples, config_patches=dict(options) or None)
        return cast("Lowered", lowered)


def _use_executors(gm: fx.GraphModule) -> None:
    operator = torch.ops.ditopt.block_sparse_attention.default
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is operator:
            executor = node.meta.get(EXECUTOR) or _preferred(node)
            node.target = _target(executor) or operator
    gm.recompile()


def _preferred(node: fx.Node) -> str:
    """The executor for a call about whose lists nothing is known."""
    q, k, *_, block_q, block_k, _ = arguments(node)
    q, k = fake_value(q), fake_value(k)
    declined = dispatch.reasons_to_decline(q, block_q, block_k)
    batch, heads, n_q, channels = (hint(size) for size in q.shape)
    blocks = (block_q, block_k)
    site = dispatch.Site(
        batch, n_q, hint(k.shape[2]), channels, *blocks, (UNKNOWN_DENSITY,) * heads
    )
    return dispatch.choose(site, device_name(q.device), declined).executor


def _target(executor: str) -> Any:
    """What stands in the graph for an executor; None for the operator itself."""
    if executor == "flex":
        from ditopt.kernels.block_sparse_attention import flex

        return flex.block_sparse_attention
    if executor == "triton":
        from ditopt.kernels.block_sparse_attention import triton  # noqa: F401  (registers it)

        return torch.ops.ditopt.block_sparse_attention_triton.default
    if executor == "fa4":
        from ditopt.kernels.block_sparse_attention import fa4  # noqa: F401  (registers it)

        return torch.ops.ditopt.block_sparse_attention_fa4.default
    return None

"""Compile canonical graphs with Inductor, in the fake mode and with the symbols of the capture.

ditopt's block-sparse operator becomes compiled FlexAttention here where that can serve the call, so
that Inductor sees through it; otherwise the operator stays and dispatches by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from ditopt.graph import arguments, fake_value, placeholders

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
        _use_flex_attention(gm)
        examples = [fake_value(node) for node in placeholders(gm)]
        with torch.no_grad(), tracing(TracingContext(detect_fake_mode(examples))):
            lowered = compile_fx(gm, examples, config_patches=dict(options) or None)
        return cast("Lowered", lowered)


def _use_flex_attention(gm: fx.GraphModule) -> None:
    from ditopt.kernels.block_sparse_attention import flex

    operator = torch.ops.ditopt.block_sparse_attention.default
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is not operator:
            continue
        q, *_, block_q, block_k, _ = arguments(node)
        if flex.reason_to_decline(fake_value(q), block_q, block_k) is None:
            node.target = flex.block_sparse_attention
    gm.recompile()

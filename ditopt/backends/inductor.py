"""Compile canonical graphs with Inductor, in the fake mode and with the symbols of the capture.

ditopt's block-sparse operator becomes compiled FlexAttention here where that can serve the call, so that Inductor sees through it;
otherwise the operator stays and dispatches by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ditopt.backends.base import Lowered
from ditopt.graph import fake_value, placeholders


class InductorBackend:
    """Inductor for everything."""

    name = "inductor"

    def available(self) -> str | None:
        """Inductor ships with torch; a missing C++ compiler shows at the first compilation, with Inductor's own message."""
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
            lowered: Lowered = compile_fx(gm, examples, config_patches=dict(options) or None)
        return lowered


def _use_flex_attention(gm: fx.GraphModule) -> None:
    from ditopt.kernels.block_sparse_attention import flex

    for node in gm.graph.nodes:
        if (
            node.op != "call_function"
            or node.target is not torch.ops.ditopt.block_sparse_attention.default
        ):
            continue
        q, block_q, block_k = fake_value(node.args[0]), node.args[5], node.args[6]
        if flex.reason_to_decline(q, block_q, block_k) is None:
            node.target = flex.block_sparse_attention
    gm.recompile()

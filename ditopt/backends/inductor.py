"""Compile canonical graphs with Inductor, in the fake mode and with the symbols of the capture.

ditopt's block-sparse operator becomes the executor that was chosen for it (by measured cost, see
`kernels.block_sparse_attention.dispatch`): FlexAttention and plain Triton, which Inductor sees
through, FlashAttention-4, or the operator itself with the kernel that it has for the device. Dense
attention goes to FlashAttention-4 where that is installed and its measured cost is lower.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from ditopt.backends.rows import rows_in_registers
from ditopt.executors import device_name, preferred, target_of
from ditopt.graph import arguments, fake_value, placeholders
from ditopt.kernels.block_sparse_attention import dispatch
from ditopt.passes.base import EXECUTOR
from ditopt.sites import SDPA, attention_operands, is_causal
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
        with (
            torch.no_grad(),
            tracing(TracingContext(detect_fake_mode(examples))),
            rows_in_registers(options) as patches,
        ):
            lowered = compile_fx(gm, examples, config_patches=patches or None)
        return cast("Lowered", lowered)


def _use_executors(gm: fx.GraphModule) -> None:
    operator = torch.ops.ditopt.block_sparse_attention.default
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is operator:
            executor = node.meta.get(EXECUTOR) or _preferred(node)
            node.target = target_of(executor) or operator
        elif node.target is SDPA and _prefers_fa4(node):
            _use_fa4(gm, node)
    gm.recompile()


def _prefers_fa4(node: fx.Node) -> bool:
    """Whether FlashAttention-4 can compute a dense attention, and faster by measured cost."""
    q, k, v, mask, _ = attention_operands(node)
    dropout = node.kwargs.get("dropout_p", (*arguments(node), 0.0, 0.0)[4])
    if mask is not None or is_causal(node) or dropout:
        return False
    tensors = [fake_value(x) for x in (q, k, v)]
    q, k, v = tensors
    if q.ndim != 4 or k.shape != v.shape or q.shape[1] != k.shape[1]:
        return False
    declined = dispatch.reasons_to_decline(q, 128, 128)
    if "fa4" in declined:
        return False
    batch, heads, n_q, channels = (hint(size) for size in q.shape)
    site = dispatch.Site(batch, n_q, hint(k.shape[2]), channels, 128, 128, (1.0,) * heads)
    chosen = dispatch.choose_dense(site, device_name(q.device), declined)
    return chosen is not None and chosen[0] == "fa4_dense"


def _use_fa4(gm: fx.GraphModule, node: fx.Node) -> None:
    from ditopt.kernels.block_sparse_attention import fa4  # noqa: F401  (registers it)

    q, k, v, _, scale = attention_operands(node)
    scale = scale if scale is not None else fake_value(q).shape[-1] ** -0.5
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function(torch.ops.ditopt.attention_fa4.default, (q, k, v, scale))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)


def _preferred(node: fx.Node) -> str:
    q, k, *_, block_q, block_k, _ = arguments(node)
    return preferred(fake_value(q), fake_value(k).shape[2], block_q, block_k)

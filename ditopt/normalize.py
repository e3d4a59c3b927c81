"""Turn one piece of a Dynamo graph into functional ATen; attention, linear and norms stay whole.

Dynamo's graph is Torch-level and may write in place (Wan's RoPE), so data-flow analysis of it would
be wrong. AOTAutograd's export, before dispatch and without decompositions, makes it functional and
keeps `aten.scaled_dot_product_attention`, `aten.linear` and the norms. It runs in Dynamo's own fake
mode, so symbolic sizes stay the same symbols.
"""

from __future__ import annotations

import warnings

import torch
from torch import fx

from ditopt.errors import CaptureError
from ditopt.float_inputs import floats_as_tensors
from ditopt.graph import fake_value, placeholders

_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
_VIEWS = (torch.ops.aten.view.default, _UNSAFE_VIEW)
_KEPT_META = ("val", "nn_module_stack", "stack_trace")


class MutatesInput(CaptureError):
    """The piece writes into what it was given, so it cannot be compiled apart from the others."""


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Functional ATen of `gm`, same inputs and outputs, `meta["val"]` on every node.

    Args:
        gm: a Torch-level GraphModule whose placeholders carry their example values: fake tensors
            or symbolic integers.

    Raises:
        MutatesInput: the piece writes into one of its inputs.
    """
    from torch._functorch.aot_autograd import aot_export_module

    examples = [fake_value(node) for node in placeholders(gm)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        canonical, signature = aot_export_module(
            gm, examples, trace_joint=False, pre_dispatch=True, decompositions={}
        )
    assert isinstance(canonical, fx.GraphModule)
    mutated = {**signature.buffers_to_mutate, **getattr(signature, "user_inputs_to_mutate", {})}
    if mutated:
        raise MutatesInput(
            f"the piece writes in place into {', '.join(sorted(mutated.values()))}",
            remedy="nothing to do: the graph is kept whole",
        )
    floats_as_tensors(canonical)
    results = canonical.graph.output_node().all_input_nodes
    for node in list(canonical.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            # What `.to()` checked while tracing: the capture's guards hold it.
            canonical.graph.erase_node(node)
            continue
        if node.target is torch.ops.aten.dropout.default and not node.args[2]:
            # What stands behind it then meets what stands before it, as the passes expect.
            node.replace_all_uses_with(node.args[0])
            canonical.graph.erase_node(node)
            continue
        if node.target is _UNSAFE_VIEW and node in results:
            _keep_no_view(node)
        if node.target in _VIEWS:
            # A pass may then change the strides of what is viewed.
            node.target = torch.ops.aten.reshape.default
        node.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    canonical.recompile()
    return canonical


def _keep_no_view(node: fx.Node) -> None:
    """A result that is no view stays none.

    Where a model breaks into several graphs, Dynamo guards the next one on it.
    """
    with node.graph.inserting_after(node):
        result = node.graph.call_function(_UNSAFE_VIEW, (node, node.args[1]))
    result.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    node.replace_all_uses_with(result, lambda user: user.op == "output")

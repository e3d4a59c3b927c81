"""Python floats that change from call to call: LoRA scales, guidance, timesteps given as numbers.

After a second value Dynamo stops compiling each apart. It hands the graph a float64 tensor without
axes and reads it there with `item()`. Backends cannot take symbolic floats, so each piece receives
that tensor, and arithmetic with the number becomes arithmetic with the tensor
(`torch.fx.passes._tensorify_python_scalars`, which Inductor runs as well). Numbers that cannot be
treated so make Dynamo start again with their value fixed, as they do without ditopt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ditopt.graph import fake_value, placeholders

_READ = torch.ops.aten._local_scalar_dense.default


def float_reads(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Nodes of a Dynamo graph that are a float input's number, with the input."""
    return {
        node: node.all_input_nodes[0]
        for node in nodes
        if node.op == "call_method"
        and node.target == "item"
        and node.all_input_nodes[0].op == "placeholder"
        and isinstance(fake_value(node), torch.SymFloat)
    }


def sink_float_arithmetic(graph: fx.Graph) -> None:
    """Let each user of a computed float compute it itself, so that none crosses a border."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or not isinstance(fake_value(node), torch.SymFloat):
            continue
        for user in [user for user in node.users if user.op != "output"]:
            with graph.inserting_before(user):
                own = graph.node_copy(node, lambda source: source)
            own.meta = {**node.meta, "nn_module_stack": user.meta.get("nn_module_stack", {})}
            user.replace_input_with(node, own)
        if not node.users:
            graph.erase_node(node)


def floats_as_tensors(canonical: fx.GraphModule) -> None:
    """Turn inputs that are symbolic floats into float64 tensors without axes, and what reads them.

    Raises:
        TensorifyScalarRestartAnalysis: a number is used where no tensor can stand; Dynamo starts
            again with its value fixed.
    """
    inputs = placeholders(canonical)
    floats = [node for node in inputs if isinstance(fake_value(node), torch.SymFloat)]
    if not floats:
        return
    from torch.fx.passes._tensorify_python_scalars import tensorify_python_scalars

    mode = _fake_mode(inputs)
    first = next(node for node in canonical.graph.nodes if node.op != "placeholder")
    for node in floats:
        with canonical.graph.inserting_before(first):
            read = canonical.graph.call_function(_READ, (node,))
        for user in [user for user in node.users if user is not read]:
            user.replace_input_with(node, read)
        read.meta["val"] = fake_value(node)
        with mode:
            node.meta["val"] = torch.empty((), dtype=torch.float64, device="cpu")
    tensorify_python_scalars(canonical, mode.shape_env, mode)


def _fake_mode(inputs: Sequence[fx.Node]) -> Any:
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([fake_value(node) for node in inputs])
    assert mode is not None  # a piece with a float has tensors, too
    return mode

"""Small helpers on fx graphs: module paths, structural keys, sub-graphs, verification.

Nothing here knows about attention, plans or backends.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.functions import Max

from ditopt.errors import CaptureError

_ROOT = re.compile(r"^L\['[^']*'\]\.?")
_DICT_MODULES = re.compile(r"\.?__dict__\['_modules'\]\['([^']*)'\]")
_MODULES = re.compile(r"\.?_modules\['([^']*)'\]")


def clean_module_path(raw: str) -> str:
    """Dynamo's module path as a fully qualified name.

    `L['self'].__dict__['_modules']['blocks'].0.attn1` becomes `blocks.0.attn1`.
    """
    path = _ROOT.sub("", raw)
    path = _DICT_MODULES.sub(r".\1", path)
    path = _MODULES.sub(r".\1", path)
    return path.strip(".")


def module_paths(node: fx.Node) -> list[str]:
    """Clean module paths around `node`, outermost first (empty for the top-level forward)."""
    stack = node.meta.get("nn_module_stack") or {}
    return [clean_module_path(entry[0]) for entry in stack.values()]


def module_path(node: fx.Node) -> str:
    """The innermost module path of `node`, or the empty string."""
    paths = module_paths(node)
    return paths[-1] if paths else ""


def fake_value(node: fx.Node) -> Any:
    """The example value that tracing recorded, whichever tracer made the graph."""
    return node.meta.get("val", node.meta.get("example_value"))


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments, of types that the caller knows from the operator.

    fx types each as a union of all that may stand in a graph, which no caller can use.
    """
    return node.args


def describe_value(value: Any) -> str:
    """Shape, stride, dtype and device as text; symbolic sizes by expression."""
    if isinstance(value, torch.Tensor):
        pairs = (
            zip(value.shape, value.stride(), strict=True) if value.layout == torch.strided else ()
        )
        strides = ", ".join(_describe_stride(size, stride) for size, stride in pairs)
        return f"{tuple(value.shape)}:({strides}):{value.dtype}:{value.device}"
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(describe_value(v) for v in value) + "]"
    return repr(value)


def _describe_stride(size: Any, stride: Any) -> str:
    """A stride as text, the same for strides that address the same elements.

    Tracing writes `Max(1, n)` for a contiguous stride here and `n` there; the stride of an axis of
    length 1 is never used.
    """
    if isinstance(size, int) and size == 1:
        return "*"
    expression = stride.node.expr if isinstance(stride, torch.SymInt) else None
    if expression is None or not expression.has(Max):
        return str(stride)
    return str(expression.replace(Max, lambda *terms: _without_one(terms)))


def _without_one(terms: tuple[Any, ...]) -> Any:
    rest = [term for term in terms if term != 1]
    # sympy has no types
    return rest[0] if len(rest) == 1 else Max(*terms)  # type: ignore[no-untyped-call]


def target_name(target: Any) -> str:
    """A stable name of a node's target."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", "")
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", repr(target))
    return f"{module}.{name}"


def free_symbols(value: Any) -> set[str]:
    """Names of the symbolic sizes that a traced value depends on."""
    from torch.fx.experimental.symbolic_shapes import free_symbols as torch_free_symbols

    if isinstance(value, (tuple, list)):
        return set().union(*(free_symbols(v) for v in value))
    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return {str(symbol) for symbol in torch_free_symbols(value)}
    return set()


def external_inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes outside `nodes` that they read, in order of first use."""
    inside = set(nodes)
    seen: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside:
                seen.setdefault(source)
    return list(seen)


def external_outputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes of `nodes` that something outside reads, in order."""
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]


def subgraph(
    root: torch.nn.Module,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
) -> fx.GraphModule:
    """A GraphModule of `nodes` with `inputs` as placeholders, returning `outputs` as a tuple."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for source in inputs:
        placeholder = graph.placeholder(source.name)
        placeholder.meta = dict(source.meta)
        copied[source] = placeholder
    for node in nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(tuple(copied[node] for node in outputs))
    return fx.GraphModule(root, graph)


def attribute(root: Any, target: str) -> Any:
    """What a `get_attr` node with this target reads."""
    for member in target.split("."):
        root = getattr(root, member)
    return root


def structural_key(
    root: torch.nn.Module,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
) -> str:
    """Hash of operators, constants, wiring and input types: equal keys mean interchangeable bodies.

    Names and parameters' values do not enter, so that the blocks of a model compare equal. What
    the graph reads from its own module `root` (constants, sub-graphs) enters by value.
    """
    number = {node: f"i{k}" for k, node in enumerate(inputs)}
    lines = [describe_value(fake_value(node)) for node in inputs]

    def text(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            if arg.op == "get_attr":
                return _content(attribute(root, str(arg.target)))
            return "%" + number[arg]
        if isinstance(arg, (tuple, list)):
            return "(" + ",".join(text(a) for a in arg) + ")"
        if isinstance(arg, dict):
            return "{" + ",".join(f"{k}:{text(v)}" for k, v in arg.items()) + "}"
        if isinstance(arg, slice):
            return f"slice{text((arg.start, arg.stop, arg.step))}"
        return repr(arg)

    for k, node in enumerate(node for node in nodes if node.op != "get_attr"):
        number[node] = f"n{k}"
        lines.append(f"{node.op} {target_name(node.target)} {text(node.args)} {text(node.kwargs)}")
    lines.append(text(tuple(outputs)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def graph_key(gm: fx.GraphModule) -> str:
    """`structural_key` of a whole GraphModule."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    return structural_key(gm, nodes, inputs, list(output_nodes(gm)))


def _content(value: Any) -> str:
    """A text that differs where values do."""
    if isinstance(value, fx.GraphModule):
        return graph_key(value)
    if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return describe_value(value) + hashlib.sha256(raw).hexdigest()
    return f"{type(value)} at {id(value)}"  # unknown things are equal to themselves only


def output_nodes(gm: fx.GraphModule) -> tuple[Any, ...]:
    """The values that the graph returns (nodes, or plain constants)."""
    (returned,) = next(iter(reversed(gm.graph.nodes))).args
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """The graph's inputs in order."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values reach the result.

    `type_as` and `empty_like` read no more than a type or a shape.
    """
    name = target_name(node.target)
    if name == "aten.type_as.default":
        return node.all_input_nodes[:1]
    if "_like" in name or name.startswith("aten.new_"):
        return []
    return node.all_input_nodes


def producers(node: fx.Node, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Nearest ancestors of `node` for which `stop` holds; the walk does not pass them."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if stop(current):
            found.setdefault(current)
            continue
        todo.extend(data_inputs(current))
    return list(found)


def verify(gm: fx.GraphModule, where: str) -> None:
    """Raise `CaptureError` unless the graph is well formed and each call carries its fake value."""
    gm.graph.lint()
    missing = [
        node.name
        for node in gm.graph.nodes
        if node.op == "call_function" and "val" not in node.meta and not _returns_nothing(node)
    ]
    if missing:
        raise CaptureError(
            f"{where}: nodes without a recorded value: {', '.join(missing[:5])}",
            remedy="a pass must set node.meta['val'] on every node that it creates",
        )


def _returns_nothing(node: fx.Node) -> bool:
    """Whether a node is an assertion, as data-dependent sizes need, or another pure effect."""
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def readable(gm: fx.GraphModule) -> str:
    """The graph as Python text with shapes, for dumps and golden tests."""
    return str(gm.print_readable(print_output=False, include_stride=False, include_device=False))


def erase_unused(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those of `nodes` that nobody reads, last first."""
    for node in reversed(list(nodes)):
        if not node.users:
            graph.erase_node(node)

"""Find the model behind a graph that Dynamo is compiling.

Dynamo tells a backend the frame's own module only, and after a graph break that is some inner
module. The model's call is still on the Python stack, so the outermost module there that holds the
graph's parameters is the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import torch
from torch import nn


def find_root(tensors: Iterable[torch.Tensor]) -> nn.Module | None:
    """The outermost module on the call stack that owns all of `tensors`, or None."""
    wanted = {id(tensor) for tensor in tensors}
    if not wanted:
        return None
    best: nn.Module | None = None
    checked: set[int] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        frame = frame.f_back
        if not isinstance(module, nn.Module):
            continue
        unwrapped = getattr(module, "_orig_mod", module)
        if id(unwrapped) in checked:
            continue
        checked.add(id(unwrapped))
        if wanted <= _tensor_ids(unwrapped):
            best = unwrapped
    return best


def tensor_names(root: nn.Module) -> dict[int, str]:
    """Qualified name of each parameter and buffer by id; tied tensors go by their first name."""
    names: dict[int, str] = {}
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        names.setdefault(id(tensor), name)
    return names


def frame_prefix(root: nn.Module, names: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Path in `root` of the module whose frame is compiled.

    Args:
        root: the model.
        names: each parameter under the name that the frame gives it.

    Returns:
        What the model's names have in front of the frame's; empty for the model's own frame.
    """
    known = tensor_names(root)
    for name, tensor in names:
        full = known.get(id(tensor), name)
        if full != name and full.endswith("." + name):
            return full[: -len(name) - 1]
        if full == name:
            return ""
    return ""


def _tensor_ids(module: nn.Module) -> set[int]:
    return {id(t) for tensors in (module.parameters(), module.buffers()) for t in tensors}


def continued_from() -> str | None:
    """Where the graph break is that the graph under compilation comes after; None without one."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        code = InstructionTranslator.current_tx().f_code
    except AttributeError:  # not called by Dynamo
        return None
    if not code.co_name.startswith("torch_dynamo_resume_in_"):
        return None
    return f"{Path(code.co_filename).name}, line {code.co_firstlineno}"


def offload_hook(root: nn.Module) -> str | None:
    """Name of a hook that moves weights during the forward (accelerate's CPU offload), or None."""
    for module in root.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if part is not None and (
                getattr(part, "offload", False) or "Offload" in type(part).__name__
            ):
                return type(part).__name__
    return None


def compiled_in_parts(root: nn.Module, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether the graph is a block that was compiled for itself (`compile_repeated_blocks`)."""
    wanted = {id(tensor) for tensor in tensors}
    parts = [
        m
        for m in root.modules()
        if m is not root and getattr(m, "_compiled_call_impl", None) is not None
    ]
    return any(wanted <= _tensor_ids(part) for part in parts)

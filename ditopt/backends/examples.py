"""What torch.export is told about the inputs of a program, for exporters."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ditopt.graph import fake_value, placeholders
from ditopt.symbols import hint, is_symbolic


def examples_of(gm: fx.GraphModule) -> tuple[tuple[Any, ...], tuple[Any, ...] | None]:
    """A new fake tensor for each input, and for each input its open axes; None where none has any.

    New, because equal blocks share theirs, and equal inputs would be one.
    """
    from torch.export import Dim

    values = [fake_value(node) for node in placeholders(gm)]
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        examples = tuple(
            torch.empty_strided(
                tuple(map(hint, v.shape)),
                tuple(map(hint, v.stride())),
                dtype=v.dtype,
                device=v.device,
            )
            for v in values
        )
    axes = tuple(
        {axis: Dim.AUTO for axis, size in enumerate(v.shape) if is_symbolic(size)} for v in values
    )
    return examples, (axes,) if any(axes) else None

"""Loop-invariant code motion over the denoising loop.

    every call:  kv = linear(prompt, W) ; out = attention(q(x), kv)
    =>  once per prompt:  kv = linear(prompt, W)
        every call:       out = attention(q(x), kv)

What does not depend on the latents is taken out of the pieces of a captured model and grouped by
the inputs that it does depend on. Each group becomes pieces of its own, one for each piece that it
comes from, so that equal blocks go on sharing programs; its results become further inputs of the
rest. `runtime.memo` runs a group when its inputs have changed. The operators and their operands are
the same as before, so the results are too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ditopt.hoist_groups import find_groups
from ditopt.hoist_rewrite import Hoisted, Rewriter
from ditopt.report import Decision
from ditopt.stack import slot_value
from ditopt.symbols import hint

if TYPE_CHECKING:
    from ditopt.capture import Captured
    from ditopt.stack import Stack


def hoist(captured: Captured, stack: Stack | None, varying: Sequence[int]) -> Hoisted:
    """Take out what the varying inputs have no part in.

    Args:
        captured: the model.
        stack: its block stack, where steps are skipped or differ.
        varying: slots of the inputs that are new in each call; empty where they are not known.
    """
    if not varying:
        reason = "which input holds the latents is unknown: none has the shape of a result"
        return _unchanged(captured, stack, reason)
    groups = find_groups(captured, varying, stack.outputs if stack is not None else ())
    if not groups.classes:
        return _unchanged(captured, stack, "every matrix product depends on the latents")
    return Rewriter(captured, stack, groups).run()


def _unchanged(captured: Captured, stack: Stack | None, reason: str) -> Hoisted:
    return Hoisted(captured, stack, decisions=(Decision("model", "hoist", False, reason),))


def varying_inputs(captured: Captured) -> tuple[int, ...]:
    """Slots of the inputs that hold the latents, told by their shape: that of a result.

    The number of channels may differ, as a model may take more than it gives (a mask, an image)
    or give more than it takes (a variance).
    """
    results = [_sizes(slot_value(captured, s)) for s in captured.outputs if isinstance(s, int)]
    users = {slot: _sizes(captured.inputs[slot].fake) for slot in captured.user_inputs.values()}
    users = {slot: sizes for slot, sizes in users.items() if len(sizes) >= 2}
    exact = tuple(slot for slot, sizes in users.items() if sizes in results)
    return exact or tuple(
        slot for slot, sizes in users.items() if any(_almost(sizes, other) for other in results)
    )


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, torch.Tensor):
        return ()
    if any(isinstance(size, torch.SymInt) and size.node.hint is None for size in value.shape):
        return ()  # sizes that follow from values
    return tuple(hint(size) for size in value.shape)


def _almost(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1

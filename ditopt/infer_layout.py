"""Infer the token grid of a captured model.

Evidence, in this order: the workload's own statement; a patch embedding (a convolution whose stride
is its kernel: its output shape is the grid); integer position ids (FLUX and its relatives pass
them); a latent input [B, C, F, H, W] or [B, C, H, W] that some patch size divides into the number
of tokens. Each gives a grid; the rest of a sequence is text, and a concatenation behind q says on
which side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from ditopt.graph import arguments, data_inputs, fake_value
from ditopt.layout import TokenLayout
from ditopt.sites import AttentionSite, attention_operands
from ditopt.symbols import hint, is_symbolic

if TYPE_CHECKING:
    from ditopt.capture import Captured

Grid = tuple[Any, Any, Any]  # frames, rows, columns; symbolic where the capture is

aten = torch.ops.aten
_CONVOLUTIONS = {aten.conv2d.default, aten.conv3d.default, aten.convolution.default}


def infer_grid(captured: Captured, inputs: Sequence[Any]) -> tuple[Grid, str] | None:
    """The grid and where it was read, or None.

    Args:
        captured: the model.
        inputs: the real values of `captured.inputs`; position ids are read from them.
    """
    for source, grids in (
        ("the patch embedding", _from_convolutions(captured)),
        ("the position ids", _from_position_ids(captured, inputs)),
        ("the latent's shape", _from_latents(captured)),
    ):
        for grid in grids:
            return grid, source
    return None


@dataclass(frozen=True)
class SiteGeometry:
    """How one attention's sequence is made of the token grid and text.

    Attributes:
        part: the whole grid, one frame of it (Latte's spatial attention), or one token for each
            frame (temporal).
        text_before: whether text stands before the grid, where there is any.
    """

    part: Literal["grid", "frame", "time"]
    text_before: bool

    def layout(self, grid: tuple[int, int, int], tokens: int) -> TokenLayout:
        """The layout of a sequence of `tokens` tokens; what the grid does not fill is text."""
        frames, height, width = grid
        if self.part == "frame":
            frames = 1
        elif self.part == "time":
            height = width = 1
        text = tokens - frames * height * width
        before, after = (text, 0) if self.text_before else (0, text)
        return TokenLayout(frames, height, width, text_before=before, text_after=after)


def site_geometry(captured: Captured, site: AttentionSite, grid: Grid) -> SiteGeometry | str:
    """The geometry of one self or joint attention at the captured sizes, or why it has none."""
    if site.kind == "cross":
        return "cross-attention has no token grid on the key side"
    frames, height, width = (hint(size) for size in grid)
    tokens, total = hint(site.tokens_q), frames * height * width
    if tokens >= total:
        return SiteGeometry("grid", tokens > total and _text_before(captured, site, total))
    if frames > 1 and tokens == height * width:
        return SiteGeometry("frame", False)
    if frames > 1 and tokens == frames:
        return SiteGeometry("time", False)
    return (
        f"the sequence has {tokens} tokens, the grid of {frames} x {height} x {width} has {total}"
    )


def _nodes(captured: Captured) -> Iterator[fx.Node]:
    for body in captured.bodies.values():
        yield from body.gm.graph.nodes


def _from_convolutions(captured: Captured) -> Iterator[Grid]:
    for node in _nodes(captured):
        if node.op != "call_function" or node.target not in _CONVOLUTIONS:
            continue
        args = arguments(node)
        x, weight, out = fake_value(args[0]), fake_value(args[1]), fake_value(node)
        kernel = tuple(weight.shape[2:])
        stride = args[3] if len(args) > 3 else [1]
        strides = tuple(stride) * (len(kernel) if len(stride) == 1 else 1)
        if kernel != strides or kernel == (1,) * len(kernel) or max(kernel) < 2:
            continue
        if len(kernel) == 3:
            yield (out.shape[2], out.shape[3], out.shape[4])
        else:
            yield (_frames_in_batch(captured, x), out.shape[2], out.shape[3])


def _frames_in_batch(captured: Captured, x: Tensor) -> Any:
    """Frames that a 2D patch embedding sees in its batch: those of a five-dimensional latent."""
    for item in captured.inputs:
        if item.role == "user" and isinstance(item.fake, Tensor) and item.fake.dim() == 5:
            batch = item.fake.shape[0]
            return x.shape[0] // batch
    return 1


def _from_position_ids(captured: Captured, inputs: Sequence[Any]) -> Iterator[Grid]:
    for item, value in zip(captured.inputs, inputs, strict=False):
        if item.role != "user" or not isinstance(value, Tensor) or value.dim() not in (2, 3):
            continue
        if is_symbolic(item.fake.shape[-2]):
            continue  # these values are one resolution's, and the graph serves several
        ids = value[0] if value.dim() == 3 else value
        if not 2 <= ids.shape[-1] <= 4 or ids.shape[0] < 4:
            continue
        grid = _raster(ids.detach().to("cpu", torch.float64))
        if grid is not None:
            yield grid


def _raster(ids: Tensor) -> Grid | None:
    """Frames, rows and columns of integer ids [N, A] in raster order on their last axes."""
    if not bool((ids == ids.round()).all()):
        return None
    values = [torch.unique(ids[:, axis]) for axis in range(ids.shape[1])]
    counts = [axis_values.numel() for axis_values in values]
    used = [axis for axis, count in enumerate(counts) if count > 1]
    if not 2 <= len(used) <= 3:
        return None
    sizes = [counts[axis] for axis in used]
    if int(torch.tensor(sizes).prod()) != ids.shape[0]:
        return None
    expected = torch.cartesian_prod(*(values[axis] for axis in used))
    if not torch.equal(expected, ids[:, used]):
        return None
    return (1, sizes[0], sizes[1]) if len(sizes) == 2 else (sizes[0], sizes[1], sizes[2])


def _from_latents(captured: Captured) -> Iterator[Grid]:
    # The first attention alone: a later one may hold text too, and a sum can look like a grid.
    counts = (_attention_tokens(node) for node in _nodes(captured))
    tokens = next((count for count in counts if count is not None), None)
    if not isinstance(tokens, int):
        return
    for item in captured.inputs:
        value = item.fake
        if item.role != "user" or not isinstance(value, Tensor) or value.dim() not in (4, 5):
            continue
        shape = [s if isinstance(s, int) else None for s in value.shape]
        if None in shape:
            continue
        frames = 1 if value.dim() == 4 else shape[2]
        height, width = shape[-2], shape[-1]
        for patch in (1, 2, 4, 8):
            if height % patch or width % patch:
                continue
            if frames * (height // patch) * (width // patch) == tokens:
                yield (frames, height // patch, width // patch)


def _attention_tokens(node: fx.Node) -> Any:
    if node.op == "call_function" and node.target is aten.scaled_dot_product_attention.default:
        return fake_value(arguments(node)[0]).shape[-2]
    return None


def _text_before(captured: Captured, site: AttentionSite, grid_tokens: int) -> bool:
    """Whether text stands before the grid.

    Read off the nearest concatenation behind q that has a part of the grid's length.
    """
    body = captured.pieces[site.piece].body
    node = next(n for n in body.gm.graph.nodes if n.name == site.node)
    todo, seen = [attention_operands(node)[0]], set()
    while todo:
        current = todo.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if current.op == "call_function" and current.target is aten.cat.default:
            joined, *axis = arguments(current)
            lengths = [hint(fake_value(part).shape[axis[0] if axis else 0]) for part in joined]
            places = [k for k, length in enumerate(lengths) if length == grid_tokens]
            if len(lengths) > 1 and len(places) == 1:
                return places[0] > 0
        todo.extend(data_inputs(current))
    return True

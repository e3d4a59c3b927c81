"""Frames of the dense and the optimized result as two sheets of equal, bounded size."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ditopt.errors import WorkloadError

if TYPE_CHECKING:
    from ditopt.pictures import Frames

MAX_BYTES = 1_600_000
"""Of both PNG files together; base64 makes a third more of it."""

_SIZES = ((12, 512), (8, 512), (8, 384), (6, 320), (4, 256), (3, 192), (2, 128), (1, 96))


@dataclass(frozen=True)
class Sheets:
    """Frames of both results below each other, as PNG in `data:` addresses.

    Attributes:
        seed: whose result it is.
        width: pixels of one frame.
        height: pixels of one frame.
        numbers: of the frames that are shown, from 0.
        total: frames of the result.
        reduced: whether frames were made smaller.
        dense: of the model as it is.
        optimized: under the plan.
    """

    seed: int
    width: int
    height: int
    numbers: tuple[int, ...]
    total: int
    reduced: bool
    dense: str
    optimized: str


def sheets(seed: int, dense: Frames, optimized: Frames) -> Sheets:
    """Two sheets that together stay below `MAX_BYTES`.

    Args:
        seed: whose results they are.
        dense: uint8 [F, H, W, 3].
        optimized: the same shape.

    Raises:
        WorkloadError: other types or shapes.
    """
    for frames in (dense, optimized):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise WorkloadError(
                "Workload.frames must give uint8 [F, H, W, 3]; "
                f"got {frames.dtype} {list(frames.shape)}"
            )
    if dense.shape != optimized.shape:
        raise WorkloadError(
            f"dense and optimized frames differ in shape: {list(dense.shape)} and "
            f"{list(optimized.shape)}"
        )
    total, height, width, _ = dense.shape
    for count, side in _SIZES:
        numbers = np.linspace(0, total - 1, min(count, total)).round().astype(int)
        zoom = min(1.0, side / max(height, width))
        size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
        made = [_sheet(frames[numbers], size) for frames in (dense, optimized)]
        if sum(map(len, made)) <= MAX_BYTES:
            break
    return Sheets(
        seed=seed,
        width=size[0],
        height=size[1],
        numbers=tuple(int(number) for number in numbers),
        total=total,
        reduced=zoom < 1.0,
        dense=_address(made[0]),
        optimized=_address(made[1]),
    )


def _sheet(frames: Frames, size: tuple[int, int]) -> bytes:
    width, height = size
    sheet = Image.new("RGB", (width, height * len(frames)))
    for number, frame in enumerate(frames):
        picture = Image.fromarray(frame)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(picture, (0, number * height))
    stream = io.BytesIO()
    sheet.save(stream, format="PNG")
    return stream.getvalue()


def _address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"

"""A picture of several results, one row each, to be looked at side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ditopt.errors import WorkloadError
from ditopt.files import atomic_path
from ditopt.video import FRAMES_PER_SECOND, check_available, write_mp4

Frames = np.ndarray[Any, np.dtype[np.uint8]]

_COLUMNS = 6
_SIDE = 160  # pixels a frame's longer side is enlarged to, by a whole factor
_MARGIN = 4
_CAPTION = 16


def write_comparison(path: str | Path, rows: Mapping[str, Frames]) -> None:
    """Write a PNG with up to six evenly spaced frames of each result.

    Args:
        path: the PNG file, written atomically.
        rows: caption and uint8 frames [F, H, W, 3] of each result, all of one shape.

    Raises:
        WorkloadError: the frames have another type or shape.
        FileError: the file cannot be written.
    """
    shape: tuple[int, ...] = next(iter(rows.values())).shape
    for caption, frames in rows.items():
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise WorkloadError(
                "Workload.frames must give uint8 [F, H, W, 3]; "
                f"got {frames.dtype} {list(frames.shape)} for {caption!r}"
            )
        if frames.shape != shape:
            raise WorkloadError(f"frames of {caption!r} differ in shape: {list(frames.shape)}")
    count, height, width, _ = shape
    zoom = max(1, _SIDE // max(height, width))
    chosen = np.linspace(0, count - 1, min(count, _COLUMNS)).round().astype(int)
    cell_height, cell_width = height * zoom + _MARGIN, width * zoom + _MARGIN
    size = (cell_width * len(chosen) + _MARGIN, (cell_height + _CAPTION) * len(rows) + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for line, (caption, frames) in enumerate(rows.items()):
        top = line * (cell_height + _CAPTION) + _MARGIN
        draw.text((_MARGIN, top), caption, fill="black")
        for column, frame in enumerate(chosen):
            picture = Image.fromarray(frames[frame])
            picture = picture.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * cell_width + _MARGIN, top + _CAPTION))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def check_kind(path: str | Path) -> str:
    """The ending of a file that `write_frames` can write; asked before minutes of sampling.

    Raises:
        WorkloadError: another kind of file.
        BackendUnavailable: MP4 needs a package that is not installed.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".png", ".gif", ".mp4"):
        raise WorkloadError(
            f"cannot draw a {kind or 'file without an ending'}",
            remedy="Name a .png, a .gif or an .mp4.",
        )
    if kind == ".mp4":
        check_available()
    return kind


def write_frames(path: str | Path, frames: Frames) -> None:
    """Write a result as GIF or MP4 (every frame) or PNG (the only frame, or some side by side).

    Args:
        path: file with one of these endings, written atomically.
        frames: uint8 [F, H, W, 3].

    Raises:
        WorkloadError: another kind of file.
        BackendUnavailable: MP4 needs a package that is not installed.
        FileError: the file cannot be written.
    """
    kind = check_kind(path)
    if kind == ".mp4":
        write_mp4(path, frames)
        return
    if kind == ".png" and len(frames) > 1:
        write_comparison(path, {"": frames})
        return
    first, *rest = (Image.fromarray(frame) for frame in frames)
    with atomic_path(path) as temporary:
        if kind == ".png":
            first.save(temporary, format="PNG")
        else:
            first.save(
                temporary, format="GIF", save_all=True, append_images=rest,
                duration=1000 // FRAMES_PER_SECOND, loop=0,
            )  # fmt: skip

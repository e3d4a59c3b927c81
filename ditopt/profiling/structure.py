"""Which structure a pattern stands for: the classes of heads that a profile tells apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, assert_never

from ditopt.patterns import (
    Band,
    Circle,
    Dense,
    FrameTile,
    HeadPattern,
    MultiDiagonal,
    Periodic,
    Radial,
    Skip,
    Stripe,
    Window,
)

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout

Structure = Literal["spatial", "temporal", "stripe", "sink", "cluster", "diffuse"]
"""Near in space; the same place through time; fixed or repeated units; the first units alone;
content, wherever it is; everything. Classes of attention.md, section 6."""


def structure_of(pattern: HeadPattern, layout: TokenLayout) -> Structure | None:
    """The structure that a pattern with geometry stands for; None for `dense` and `skip`."""
    match pattern:
        case Dense() | Skip():
            return None
        case Band() | Radial():
            return "spatial"
        case MultiDiagonal():
            return "temporal" if pattern.period == "frame" else "stripe"
        case Stripe():
            units = layout.frames * (1 if pattern.unit == "frame" else layout.height)
            return "sink" if pattern.every >= units else "stripe"
        case FrameTile():
            return "sink" if pattern.references == 1 else "stripe"
        case Window():
            reach = min(1.0, pattern.rows / layout.height) * min(1.0, pattern.cols / layout.width)
            return _longer(pattern.frames, reach, layout)
        case Circle():
            sides = (min(1.0, 2 * pattern.radius / n) for n in (layout.height, layout.width))
            return _longer(pattern.frames, next(sides) * next(sides), layout)
        case Periodic():
            return _periodic(pattern, layout)
    assert_never(pattern)


def _longer(frames: int, reach: float, layout: TokenLayout) -> Structure:
    """Temporal where a window covers more of time than of a frame."""
    return "temporal" if layout.frames > 1 and frames / layout.frames > reach else "spatial"


def _periodic(pattern: Periodic, layout: TokenLayout) -> Structure:
    """Stripes where units repeat; a window in whatever does not."""
    frames, rows = (
        _axis(pattern.frame_width, pattern.frame_period, layout.frames),
        _axis(pattern.row_width, pattern.row_period, layout.height),
    )
    if "repeated" in (frames, rows):
        return "stripe"
    return "temporal" if frames == "whole" and layout.frames > 1 else "spatial"


def _axis(width: int, period: int, length: int) -> str:
    if width >= period:
        return "whole"
    return "repeated" if period < length else "local"

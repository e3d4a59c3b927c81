"""Results as MP4 files, by PyAV where it is installed (`pip install 'ditopt[video]'`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditopt.errors import BackendUnavailable
from ditopt.files import atomic_path

if TYPE_CHECKING:
    import numpy as np

FRAMES_PER_SECOND = 10
"""Of what `ditopt run` writes, GIFs included."""

_SIDE = 256  # pixels a frame's longer side is enlarged to, by a whole even factor
_CODECS = ("libx264", "mpeg4")  # the first one that PyAV was built with


def check_available() -> None:
    """Tell now, not after minutes of sampling, that MP4 files cannot be written.

    Raises:
        BackendUnavailable: PyAV is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "writing an .mp4 needs PyAV, which is not installed",
            remedy="pip install 'ditopt[video]', or name a .gif.",
        ) from error


def write_mp4(
    path: str | Path, frames: np.ndarray[Any, np.dtype[np.uint8]], rate: int = FRAMES_PER_SECOND
) -> None:
    """Write frames as H.264 (MPEG-4 where the encoder is missing), 4:2:0, atomically.

    Args:
        path: the file.
        frames: uint8 [F, H, W, 3]; small ones are enlarged by repeating pixels, which also makes
            both sides even, as 4:2:0 wants.
        rate: frames per second.

    Raises:
        BackendUnavailable: PyAV is not installed.
        FileError: the file cannot be written.
    """
    check_available()
    import av

    zoom = 2 * max(1, _SIDE // (2 * max(frames.shape[1:3])))
    large = frames.repeat(zoom, axis=1).repeat(zoom, axis=2)
    codec = next(name for name in _CODECS if name in av.codecs_available)
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = large.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in large:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))

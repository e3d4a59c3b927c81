"""Writing files so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditopt.errors import FileError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to, renamed over `path` when the block succeeds.

    Usable with writers that want a file name (safetensors, Pillow). On any error, a full disk
    included, the temporary file is removed and whatever stood at `path` stays as it was.

    Raises:
        FileError: the folder is missing, or the operating system refuses the write.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent
        )
        temporary = Path(name)
        os.close(descriptor)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())  # else a crash may leave an empty file
        temporary.chmod(_default_mode())
        temporary.replace(target)
    except OSError as error:
        cause = error.strerror or str(error)
        raise FileError(
            f"cannot write {str(target)!r}: {cause}",
            remedy="Nothing was overwritten; check that the folder exists and has space.",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _default_mode() -> int:
    """Permissions a plain `open(path, "w")` would give; mkstemp's are for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, before the work that would fill it.

    Raises:
        FileError: its folder is missing or may not be written to, or a folder has its name.
    """
    target = Path(path)
    if target.is_dir():
        raise FileError(f"cannot write {str(target)!r}: it is a folder")
    if not target.parent.is_dir():
        raise FileError(f"cannot write {str(target)!r}: its folder does not exist")
    if not os.access(target.parent, os.W_OK):
        raise FileError(f"cannot write {str(target)!r}: its folder is not writable")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder at `path`, made with its parents where it is missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = error.strerror or str(error)
        raise FileError(f"cannot make the folder {str(path)!r}: {cause}") from error
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_text(path: str | os.PathLike[str]) -> str:
    """The UTF-8 text of a file.

    Raises:
        FileError: the file is missing, unreadable or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"cannot read {str(path)!r}: not a UTF-8 text file") from error

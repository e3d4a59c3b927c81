"""The safetensors file beside a plan: pinned by its sha256, never a pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
from safetensors import SafetensorError

from ditopt.errors import PlanError
from ditopt.files import atomic_path
from ditopt.plan.records import SideFile

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 4 << 30
"""Largest side file that is read."""

_REMEDY = "Copy the plan and its side file together, or make the plan anew."


def save(path: Path, tensors: Mapping[str, Tensor]) -> SideFile:
    """Write `tensors` atomically and return the record that pins them."""
    data = safetensors.torch.save({name: tensors[name].contiguous() for name in sorted(tensors)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return SideFile(name=path.name, sha256=hashlib.sha256(data).hexdigest())


def load(folder: Path, record: SideFile) -> dict[str, Tensor]:
    """The tensors that `record` pins.

    Raises:
        PlanError: missing, too large, truncated or changed.
    """
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise PlanError(f"side_file: {record.name} has {size} bytes, the limit is {MAX_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise PlanError(
            f"side_file: cannot read {record.name}: {error.strerror}", remedy=_REMEDY
        ) from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise PlanError(
            f"side_file: {record.name} is truncated or was changed, its sha256 is not the plan's",
            remedy=_REMEDY,
        )
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise PlanError(f"side_file: {record.name} is not safetensors: {error}") from error

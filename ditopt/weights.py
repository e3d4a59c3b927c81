"""Weights that a pass derived from the model's own: made again when the originals change."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class FusedTensor:
    """Several weights one below the other.

    The originals are recognised by object, storage address and version counter; a change of any of
    them (LoRA, `load_state_dict`, an optimizer step) makes the copy again, in place, so that its
    address stays.

    Args:
        slots: environment slots of the originals.
        release: free the originals' memory once the copy exists. They cannot be used or changed
            after that.
    """

    def __init__(self, slots: Sequence[int], *, release: bool) -> None:
        self._slots = tuple(slots)
        self._release = release
        self._seen: list[tuple[weakref.ref[Tensor], int, int]] | None = None
        self._value: Tensor | None = None
        self._released = False

    def get(self, env: Sequence[Any]) -> Tensor:
        """The fused tensor, up to date with the originals in `env`."""
        if self._released:
            assert self._value is not None
            return self._value
        parts = [env[slot] for slot in self._slots]
        if self._value is None or self._seen is None or not all(map(_unchanged, parts, self._seen)):
            self._make(parts)
            self._seen = [(weakref.ref(p), p.data_ptr(), _version(p)) for p in parts]
            if self._release:
                for part in parts:
                    part.untyped_storage().resize_(0)
                self._released = True
        assert self._value is not None
        return self._value

    def invalidate(self) -> None:
        """Make the copy again at the next call (for changes that leave no trace on a tensor)."""
        self._seen = None

    def _make(self, parts: Sequence[Tensor]) -> None:
        with torch.no_grad():
            fresh = torch.cat([part.detach() for part in parts])
            fits = (
                self._value is not None
                and self._value.shape == fresh.shape
                and self._value.dtype == fresh.dtype
            )
            if fits and self._value is not None and self._value.device == fresh.device:
                self._value.copy_(fresh)
            else:
                self._value = fresh


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, seen: tuple[weakref.ref[Tensor], int, int]) -> bool:
    reference, address, version = seen
    return reference() is tensor and tensor.data_ptr() == address and _version(tensor) == version

"""Weights that a pass derived from the model's own: made again when the originals change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Make = Callable[[list[Tensor]], Mapping[str, Tensor]]


class DerivedTensors:
    """Tensors made from some of the model's own.

    The originals are recognised by object, storage address and version counter; a change of any of
    them (LoRA, `load_state_dict`, an optimizer step) makes the tensors again, in place, so that
    their addresses stay.

    Args:
        slots: environment slots of the originals.
        make: from the originals to the derived tensors by name.
        release: free the originals' memory once the derived tensors exist. They cannot be used or
            changed after that.
    """

    def __init__(self, slots: Sequence[int], make: Make, *, release: bool) -> None:
        self.slots = tuple(slots)
        self.release = release
        self._make = make
        self._seen: list[tuple[weakref.ref[Tensor], int, int]] | None = None
        self._values: dict[str, Tensor] = {}
        self._readers: dict[str, Callable[[Sequence[Any]], Tensor]] = {}
        self._released = False

    def reader(self, name: str) -> Callable[[Sequence[Any]], Tensor]:
        """A function from the environment to one of the tensors; the same for the same name.

        A program reads all of them, in the order in which their readers were made; the first one
        looks at the originals.
        """
        if name not in self._readers:
            looks = not self._readers
            self._readers[name] = partial(self._get if looks else self._get_beside, name)
        return self._readers[name]

    @property
    def nbytes(self) -> int:
        """Memory of the derived tensors; 0 before they are made."""
        return sum(value.untyped_storage().nbytes() for value in self._values.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Of the derived tensors; empty before they are made."""
        return tuple(self._values)

    def invalidate(self) -> None:
        """Make the tensors again at the next call (for changes that leave no trace on a tensor)."""
        self._seen = None

    def _get(self, name: str, env: Sequence[Any]) -> Tensor:
        if self._released:
            return self._values[name]
        parts = [env[slot] for slot in self.slots]
        if self._seen is None or not all(map(_unchanged, parts, self._seen)):
            self._refresh(parts)
            self._seen = [(weakref.ref(p), p.data_ptr(), _version(p)) for p in parts]
            if self.release:
                for part in parts:
                    part.untyped_storage().resize_(0)
                self._released = True
        return self._values[name]

    def _get_beside(self, name: str, env: Sequence[Any]) -> Tensor:
        return self._values[name] if self._seen is not None else self._get(name, env)

    def _refresh(self, parts: list[Tensor]) -> None:
        with torch.no_grad():
            for name, fresh in self._make(parts).items():
                kept = self._values.get(name)
                if kept is not None and _fits(kept, fresh):
                    kept.copy_(fresh)
                else:
                    self._values[name] = fresh


class FusedTensor(DerivedTensors):
    """Several weights one below the other."""

    def __init__(self, slots: Sequence[int], *, release: bool) -> None:
        super().__init__(slots, _stacked, release=release)
        self.get = self.reader("stacked")


def _stacked(parts: list[Tensor]) -> dict[str, Tensor]:
    return {"stacked": torch.cat([part.detach() for part in parts])}


def _fits(kept: Tensor, fresh: Tensor) -> bool:
    return (kept.shape, kept.dtype, kept.device) == (fresh.shape, fresh.dtype, fresh.device)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, seen: tuple[weakref.ref[Tensor], int, int]) -> bool:
    reference, address, version = seen
    return reference() is tensor and tensor.data_ptr() == address and _version(tensor) == version

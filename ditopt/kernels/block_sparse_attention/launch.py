"""Launches of Triton programs that skip what Triton does again for every call.

`kernel[grid](...)` of Triton 3.6 inspects every argument, spells out the layout of every tensor
descriptor and builds a key of it all: most of the 160 to 190 us that one call of the Gluon kernel
cost the host. A `Launcher` does that once per key of its caller's and from then on hands the
arguments to the compiled program.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Box(NamedTuple):
    """A tensor that the copy engine reads or writes in boxes; `TensorDescriptor` without checks."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: list[int]
    layout: Any
    padding: str = "zero"

    def checked(self) -> Any:
        """What Triton compiles for."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        return TensorDescriptor(*self)


class Launcher:
    """One kernel whose compiled programs are kept by a key of the caller's.

    The key must hold everything that a program depends on: device, data types, constants, options,
    descriptor layouts. The kernel's other arguments must be declared `do_not_specialize`.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._programs: dict[Hashable, Any] = {}

    def __call__(
        self, key: Hashable, grid: int, arguments: tuple[Any, ...], **options: Any
    ) -> None:
        """Launch ``grid`` programs; ``arguments`` in the kernel's order, constants included."""
        program = self._programs.get(key)
        if program is None:
            full = [x.checked() if isinstance(x, Box) else x for x in arguments]
            self._programs[key] = self._kernel[(grid,)](*full, **options)
        else:
            program[(grid, 1, 1)](*arguments)

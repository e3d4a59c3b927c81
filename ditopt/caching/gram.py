"""`ResidualGram`: inner products of block-stack residuals between all calls of a sampling run.

Every forecast by a linear combination of stored residuals has a squared error that is a quadratic
form of these inner products, so T x T numbers per run are all that planning needs to keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditopt.errors import ProfileError

# Elements converted to fp64 at a time: 16 MiB for the values and as much for the products.
_CHUNK = 1 << 21


class ResidualGram:
    """Online Gram matrix of residuals, in fp64.

    Exact, it keeps every residual as it came: T * n * itemsize bytes for n elements. With a sketch
    of size k it keeps T * k fp64 numbers and 5 n bytes of random signs and buckets, and the squared
    norm of any combination of residuals has a relative standard deviation of at most sqrt(2 / k):
    1.1% for k = 16384. The sketch is linear, so the error of a forecast is estimated with this
    relative precision however small it is beside the residuals (count sketch: Charikar et al.,
    ICALP 2002; as an embedding: Clarkson and Woodruff, STOC 2013).

    Args:
        calls: T, number of calls of one guidance branch.
        sketch: k, or None for exact products.
        seed: of the sketch. Grams that are added up may have different seeds.
    """

    def __init__(self, calls: int, *, sketch: int | None = None, seed: int = 0) -> None:
        if calls < 1 or (sketch is not None and sketch < 1):
            raise ProfileError(f"calls is {calls} and sketch {sketch}, expected at least 1")
        self.calls = calls
        self._sketch = sketch
        self._seed = seed
        self._kept: dict[int, list[Tensor]] = {}
        self._hashes: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._gram = torch.zeros(calls, calls, dtype=torch.float64)

    def add(self, call: int, *residuals: Tensor) -> None:
        """Record one call.

        Args:
            call: 0 to T - 1; each once, in any order.
            residuals: output minus input of the block stack, one tensor per stream (video, text);
                of the same shapes at every call. They are treated as one long vector.
        """
        if not 0 <= call < self.calls or call in self._kept:
            raise ProfileError(
                f"residual of call {call} is repeated or outside 0 to {self.calls - 1}"
            )
        if not all(bool(torch.isfinite(residual).all()) for residual in residuals):
            raise ProfileError(f"the block stack's residual at call {call} is not finite")
        kept = [self._keep(i, residual.detach()) for i, residual in enumerate(residuals)]
        shapes = [vector.numel() for vector in kept]
        for other, vectors in self._kept.items():
            if [vector.numel() for vector in vectors] != shapes:
                raise ProfileError(f"residuals of calls {other} and {call} differ in shape")
            self._gram[other, call] = self._gram[call, other] = _inner(vectors, kept)
        self._gram[call, call] = _inner(kept, kept)
        self._kept[call] = kept

    def matrix(self) -> Tensor:
        """[T, T] fp64 inner products, on the CPU."""
        missing = sorted(set(range(self.calls)) - set(self._kept))
        if missing:
            raise ProfileError(
                f"no residual was recorded for calls {missing}, expected all of {self.calls}"
            )
        return self._gram.clone()

    def _keep(self, stream: int, residual: Tensor) -> Tensor:
        if self._sketch is None:
            return residual.flatten().clone()
        flat = residual.flatten()
        buckets, signs = self._hash(stream, flat)
        kept = torch.zeros(self._sketch, dtype=torch.float64, device=flat.device)
        chunks = (torch.split(tensor, _CHUNK) for tensor in (buckets, signs, flat))
        for bucket, sign, values in zip(*chunks, strict=True):
            kept.index_add_(0, bucket, values.double().mul_(sign))
        return kept

    def _hash(self, stream: int, flat: Tensor) -> tuple[Tensor, Tensor]:
        key = (stream, flat.numel())
        if key not in self._hashes:
            assert self._sketch is not None
            # Drawn on the CPU, so that a seed means the same sketch on every device.
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + stream)
            size = (flat.numel(),)
            buckets = torch.randint(self._sketch, size, generator=generator, dtype=torch.int32)
            signs = torch.randint(2, size, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            self._hashes[key] = buckets.to(flat.device), signs.to(flat.device)
        return self._hashes[key]


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Inner product of two vectors that are given in pieces, in fp64."""
    products = [
        a.double() @ b.double()
        for x, y in zip(left, right, strict=True)
        for a, b in zip(torch.split(x, _CHUNK), torch.split(y, _CHUNK), strict=True)
    ]
    return float(torch.stack(products).sum())

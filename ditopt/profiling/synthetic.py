"""Heads with a planted structure: what a profiler has to find, at any size and without weights.

Random Gaussian queries and keys have no structure to find. A planted head has scores ``q . k`` that
depend on where tokens are (random Fourier features of a Gaussian kernel, as rotary positions give),
on which unit the key is in, or on what the tokens hold (clusters), plus noise (attention.md,
section 6). Parameters are drawn, and the density that holds most of the attention is computed from
the noise-free scores, so that it is known without the profiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout
    from ditopt.profiling.structure import Structure

HEAD_DIM = 64
SCALE = 1.0
"""Factor of the scores: features hold their strength themselves."""

_STRENGTH = 12.0
"""Score of a planted pair over any other: e^12 times the weight."""
_NOISE = 0.1
_FEATURES = 30
_EVERYWHERE = 1e6  # a kernel so wide that the coordinate does not matter


@dataclass(frozen=True)
class PlantedHead:
    """One head.

    Attributes:
        structure: its class.
        layout: token grid, without text.
        seed: draws the parameters.
    """

    structure: Structure
    layout: TokenLayout
    seed: int

    def operands(self, draw: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v float32 [N, 64] of one call; the structure is the same in every draw.

        Clusters are of the seed and the draw: which tokens share a content differs by sample.
        """
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + draw)
        q, k = self._features(draw)
        tokens = self.layout.tokens
        noise = torch.randn(2, tokens, HEAD_DIM, generator=generator) * _NOISE
        return q + noise[0], k + noise[1], torch.randn(tokens, HEAD_DIM, generator=generator)

    def density(self, block: int, draw: int, share: float = 0.9) -> float:
        """Least density that holds `share` of the planted attention.

        Of blocks in raster order; for `cluster`, of pairs of tokens, which lie anywhere.
        """
        q, k = (x.double() for x in self._features(draw))
        weights = (q @ k.T).softmax(-1)
        if self.structure == "cluster":
            return _least(weights, share)
        n = self.layout.tokens
        padded = F.pad(weights, (0, -n % block, 0, -n % block))
        count = -(-n // block)
        return _least(padded.view(count, block, count, block).sum(dim=(1, 3)), share)

    def _parameters(self) -> torch.Generator:
        return torch.Generator().manual_seed(7_919 * self.seed + 17)

    def _features(self, draw: int) -> tuple[Tensor, Tensor]:
        generator = self._parameters()
        size = _STRENGTH**0.5
        if self.structure in ("spatial", "temporal"):
            frequencies = torch.randn(3, _FEATURES, generator=generator)
            angles = self._coordinates() @ frequencies
            code = torch.cat([angles.cos(), angles.sin()], -1) / _FEATURES**0.5
            code = F.pad(code, (0, HEAD_DIM - code.shape[-1])) * size
            return code, code
        if self.structure == "cluster":
            centres = F.normalize(torch.randn(8, HEAD_DIM, generator=generator), dim=-1)
            code = centres[self._labels(draw)] * size
            return code, code
        direction = F.normalize(torch.randn(HEAD_DIM, generator=generator), dim=0) * size
        keys = self._preferred().float()[:, None] * direction
        return direction.expand(self.layout.tokens, -1), keys

    def _coordinates(self) -> Tensor:
        """Frame, row and column of each token in units of the kernel's width, float32 [N, 3]."""
        grid = (self.layout.frames, self.layout.height, self.layout.width)
        axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        places = torch.stack(axes, -1).flatten(0, 2).float()
        drawn = float(torch.rand((), generator=self._parameters()))
        if self.structure == "temporal":
            width = 0.8 + 1.2 * drawn
            return places / torch.tensor([_EVERYWHERE, width, width])
        width = 2.0 + 6.0 * drawn
        return places / torch.tensor([0.3, width, width])

    def _preferred(self) -> Tensor:
        """Keys that every query looks at, 0 or 1, [N]; none for `diffuse`."""
        layout, generator = self.layout, self._parameters()
        frame = torch.arange(layout.tokens) // (layout.height * layout.width)
        if self.structure == "sink":
            part = 0.25 + 0.75 * float(torch.rand((), generator=generator))
            return torch.arange(layout.tokens) < part * layout.height * layout.width
        if self.structure == "stripe":
            every = int(torch.randint(2, 5, (), generator=generator))
            return frame % every == 0
        return torch.zeros(layout.tokens, dtype=torch.bool)

    def _labels(self, draw: int) -> Tensor:
        """Cluster of each token, [N]."""
        count = int(torch.randint(4, 9, (), generator=self._parameters()))
        generator = torch.Generator().manual_seed(31 * self.seed + 1_009 * draw)
        return torch.randint(count, (self.layout.tokens,), generator=generator)


def _least(mass: Tensor, share: float) -> float:
    """Fewest entries that hold a share, over all."""
    values = mass.flatten().sort(descending=True).values.cumsum(0)
    count = int((values < share * values[-1]).sum()) + 1
    return count / mass.numel()

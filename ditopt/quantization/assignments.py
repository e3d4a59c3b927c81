"""Pieces of a weight that choose among their nearest codewords (VQ4DiT, arXiv 2408.17131).

Each piece of four weights is a mixture of a few candidate words. Ratios and words are learned;
a term drives each ratio to 0 or 1, and a piece whose mixture is nearly one word is decided.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditopt.quantization.codebook import Codebook, checksum, nearest_words, pieces_of

_DECIDED = 50.0
"""Logit of a decided candidate: its softmax is 1 and has no gradient."""


class Assignments(nn.Module):
    """One layer's candidates.

    Args:
        weight: [N, K] in float32; K is a multiple of 4.
        nearest: candidates of each piece.

    Attributes:
        words: [256, 4], learned; k-means' at first.
        logits: [N K / 4, nearest], learned; at first ``log(d_last / d_i)`` of the distances.
    """

    candidates: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, nearest: int) -> None:
        super().__init__()
        self._shape = weight.shape
        self._checksum = checksum(weight)
        pieces, scale = pieces_of(weight)
        words = Codebook().encode(weight)["words"].float()
        candidates = nearest_words(pieces, words, nearest)
        distances = (words[candidates] - pieces[:, None]).norm(dim=2).clamp(min=1e-6)
        self.register_buffer("candidates", candidates)
        self.register_buffer("scale", scale)
        self.words = nn.Parameter(words)
        self.logits = nn.Parameter((distances[:, -1:] / distances).log())

    @property
    def ratios(self) -> Tensor:
        """Share of each candidate in its piece, [N K / 4, nearest]."""
        return self.logits.softmax(1)

    def weight(self) -> Tensor:
        """The weight [N, K] as the mixtures are."""
        pieces = (self.ratios[..., None] * self.words[self.candidates]).sum(1)
        return pieces.reshape(self._shape) * self.scale.float()

    def undecided(self) -> Tensor:
        """Mean of ``1 - |2 r - 1|`` over all ratios: 0 where every piece is one word."""
        return (1 - (2 * self.ratios - 1).abs()).mean()

    @torch.no_grad()
    def settle(self, share: float) -> None:
        """Decide the pieces of which one candidate has more than a share."""
        ratios = self.ratios
        top = ratios.argmax(1, keepdim=True)
        decided = torch.full_like(ratios, -_DECIDED).scatter(1, top, _DECIDED)
        done = ratios.gather(1, top) > share
        self.logits.copy_(torch.where(done, decided, self.logits))

    @torch.no_grad()
    def parts(self) -> dict[str, Tensor]:
        """What a plan's side file holds of the layer: each piece has its likeliest word."""
        n, k = self._shape
        chosen = self.candidates.gather(1, self.logits.argmax(1, keepdim=True))
        return {
            "codes": chosen.to(torch.uint8).reshape(n, k // 4),
            "words": self.words.half(),
            "scale": self.scale,
            "checksum": self._checksum,
        }

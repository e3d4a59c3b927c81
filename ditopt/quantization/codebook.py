"""2-bit weights as in VQ4DiT (arXiv 2408.17131): four neighbours along K share one of 256 words.

The codebook is the k-means solution over the rows' pieces, each row divided by its root mean square
first, which costs 16 bits a row and spares codewords. Seeds are drawn as k-means++ does. What the
paper's calibration adds is in `block_calibration`; its result travels in a plan's side file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditopt.errors import WeightError

aten = torch.ops.aten

_WORDS, _WIDTH = 256, 4
_ITERATIONS = 25
_SAMPLE = 1 << 15
_CHUNK = 1 << 18

CALIBRATED = ("codes", "words", "scale", "checksum")
"""Tensors of a calibrated layer in a plan's side file."""


class Codebook:
    """See the module."""

    name = "codebook"
    multiple = _WIDTH

    def parts(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Indices [N, K / 4], the codebook [256, 4], a scale for each row [N, 1]."""
        return {
            "codes": ((n, k // _WIDTH), torch.uint8),
            "words": ((_WORDS, _WIDTH), torch.float16),
            "scale": ((n, 1), torch.float16),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """From [N, K] float32; K is a multiple of 4."""
        n, k = weight.shape
        pieces, scale = pieces_of(weight)
        words = _k_means(pieces).half()
        return {
            "codes": _nearest(pieces, words.float()).to(torch.uint8).reshape(n, k // _WIDTH),
            "words": words,
            "scale": scale,
        }

    def decode(self, parts: Mapping[str, Any], n: int, k: int, out: torch.dtype) -> Any:
        """The weight [N, K]."""
        indices = aten.to.dtype(parts["codes"], torch.int64)
        pieces = aten.index.Tensor(parts["words"], [indices])
        rows = aten.to.dtype(aten.reshape.default(pieces, [n, k]), torch.float32)
        scale = aten.to.dtype(parts["scale"], torch.float32)
        return aten.to.dtype(aten.mul.Tensor(rows, scale), out)


def pieces_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours along K of each row over its scale [N K / 4, 4], and the scales [N, 1] in fp16."""
    scale = weight.square().mean(1, keepdim=True).sqrt().half().clamp(min=6e-8)
    return (weight / scale.float()).reshape(-1, _WIDTH), scale


def checksum(weight: Tensor) -> Tensor:
    """[2] float64 that tells whether a weight is the one that was calibrated."""
    wide = weight.double()
    return torch.stack([wide.sum(), wide.abs().sum()]).cpu()


def calibrated_parts(tensors: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """What `Codebook.encode` gives, from a plan's side file.

    Raises:
        WeightError: the weight has changed since.
    """
    seen, now = tensors["checksum"], checksum(weight)
    if not torch.allclose(seen, now, rtol=1e-9, atol=1e-9 * float(now[1])):
        raise WeightError(
            "the weight of a calibrated codebook has changed since its calibration",
            remedy="Calibrate again, or say `calibrated: false`: words from the weight alone.",
        )
    return {name: tensors[name].to(weight.device) for name in ("codes", "words", "scale")}


def _k_means(pieces: Tensor) -> Tensor:
    """[256, 4] codewords; the same for the same pieces."""
    draw = torch.Generator().manual_seed(0)
    if len(pieces) > _SAMPLE:
        chosen = torch.randperm(len(pieces), generator=draw)[:_SAMPLE]
        pieces = pieces[chosen.to(pieces.device)]
    words = _seeds(pieces, draw)
    for _ in range(_ITERATIONS):
        nearest = _nearest(pieces, words)
        total = torch.zeros_like(words).index_add_(0, nearest, pieces)
        count = torch.bincount(nearest, minlength=_WORDS)[:, None]
        words = torch.where(count > 0, total / count.clamp(min=1), words)
    return words


def _seeds(pieces: Tensor, draw: torch.Generator) -> Tensor:
    """k-means++: each next word is a piece, drawn by its squared distance to the words so far."""
    words = pieces[torch.zeros(1, dtype=torch.long, device=pieces.device)]
    distance = (pieces - words).square().sum(1)
    for _ in range(_WORDS - 1):
        mass = distance.cumsum(0)
        target = torch.rand(1, generator=draw).to(mass) * mass[-1]
        picked = torch.searchsorted(mass, target).clamp(max=len(pieces) - 1)
        words = torch.cat([words, pieces[picked]])
        distance = torch.minimum(distance, (pieces - pieces[picked]).square().sum(1))
    return words


def nearest_words(pieces: Tensor, words: Tensor, count: int) -> Tensor:
    """Indices [P, count] of the nearest words for each piece, nearest first."""
    half = words.square().sum(1) / 2
    chunks = torch.split(pieces, _CHUNK)
    return torch.cat([(part @ words.T - half).topk(count).indices for part in chunks])


def _nearest(pieces: Tensor, words: Tensor) -> Tensor:
    """Index of the nearest word for each piece."""
    half = words.square().sum(1) / 2
    return torch.cat([(part @ words.T - half).argmax(1) for part in torch.split(pieces, _CHUNK)])

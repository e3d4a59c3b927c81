"""The output error of every candidate at a head, and its block mass, at the price of a dense pass.

Of each key block a query gets a sum of weights e_j and a weighted sum of values x_j; attention to
any union S of blocks is sum_S x_j / sum_S e_j (attention.md, Appendix A9). So the expensive part is
done once, and every candidate costs one small matrix product. Relative to their sum over all blocks
the e_j are the exact mass of blocks (A5, AdaSpa's second pass). Dropped blocks that their mean
stands for (A6) add p_j and p_j m_j for j not in S, with the mean value m_j and p_j = n_j exp(q .
mean key). No N x N map is ever held. Errors are those of the output and not of the attention
weights: a head whose values hardly differ tolerates a low recall (A5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SCRATCH_BYTES = 256 << 20
"""Memory for the tiles of a pass unless told; more heads than fit are taken in turns."""

_TINY = 1e-20
"""Kept masses below are beyond float32: such rows are computed again relative to their maximum."""


@dataclass(frozen=True)
class CandidateErrors:
    """Sums over batch, queries and channels, float64 on the CPU.

    Attributes:
        squared_error: [H, C] ``|o_candidate - o_dense|^2`` with dropped blocks left out.
        mean_error: [H, C] the same where their means stand for them.
        squared_norm: [H] ``|o_dense|^2``; their ratio's root is the relative L2 error.
        kept_mass: [H, C] share of the attention that the kept blocks hold, 0 to 1.
        mass: [H, QB, KB] share of each key block in the attention of a query block, mean over
            batch and queries; float32, rows sum to 1.
    """

    squared_error: Tensor
    mean_error: Tensor
    squared_norm: Tensor
    kept_mass: Tensor
    mass: Tensor


@torch.no_grad()
def candidate_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    chosen: Tensor | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> CandidateErrors:
    """Output error of each candidate against dense attention.

    Args:
        q: [B, H, N_q, D], any floating dtype; computed in float32.
        k: [B, H, N_k, D].
        v: [B, H, N_k, D].
        keep: bool [C, QB, KB], the blocks that each candidate keeps, for all heads.
        block_q: query tokens of a block.
        block_k: key tokens of a block.
        scale: factor of the scores.
        chosen: bool [B, H, S, QB, KB], candidates that depend on the data: S more, after the C.
        scratch_bytes: memory for tiles; one head of one query block is always taken.

    Returns:
        Errors, norms and masses per head. Cost: one dense attention, and 4 C D FLOPs per query and
        key block.
    """
    batch, heads, n_q, dim = q.shape
    keep = keep.to(q.device)
    count = len(keep) + (0 if chosen is None else chosen.shape[2])
    chunk = _heads_at_a_time(batch, k.shape[2], dim, count, block_q, block_k)
    chunk = max(1, min(heads, scratch_bytes // chunk))
    parts = []
    for first in range(0, heads, chunk):
        part = slice(first, first + chunk)
        blocks = _Blocks(keep, None if chosen is None else chosen[:, part].to(q.device))
        keys = _Keys.of(k[:, part], v[:, part], block_k)
        found = _Sums.over(q[:, part], keys, blocks, block_q, scale, exact=False)
        if float(found.lowest) < _TINY:
            found = _Sums.over(q[:, part], keys, blocks, block_q, scale, exact=True)
        parts.append(found)
    return CandidateErrors(
        squared_error=torch.cat([p.dropped for p in parts]).cpu(),
        mean_error=torch.cat([p.mean for p in parts]).cpu(),
        squared_norm=torch.cat([p.norm for p in parts]).cpu(),
        kept_mass=torch.cat([p.kept for p in parts]).cpu() / (batch * n_q),
        mass=torch.cat([p.mass for p in parts]).cpu(),
    )


def _heads_at_a_time(
    batch: int, n_k: int, dim: int, candidates: int, block_q: int, block_k: int
) -> int:
    """Bytes of tiles for one head: scores twice, sums by block, and two sets of candidates."""
    blocks = -(-n_k // block_k)
    per_query = 2 * n_k + blocks * dim + candidates * (3 * dim + blocks)
    return 4 * batch * block_q * per_query


@dataclass(frozen=True)
class _Keys:
    """Keys and values by block: [B, H, KB, block, D] with zeros past the end, and their means."""

    keys: Tensor
    values: Tensor
    key_means: Tensor
    value_means: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor, block: int) -> _Keys:
        keys, values = (_key_blocks(x.float(), block) for x in (k, v))
        start = torch.arange(0, k.shape[2], block, device=k.device)
        lengths = (k.shape[2] - start).clamp(max=block).float()
        means = [x.sum(3) / lengths[:, None] for x in (keys, values)]
        return cls(keys, values, means[0], means[1], lengths)

    def attend(self, tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries [B, H, bq, D] against each block, relative to each query's largest score.

        Returns:
            Weighted sums of values [B, H, KB, bq, D], sums of weights [B, H, bq, KB], and the
            weights of the blocks' means, which by Jensen's inequality are never larger.
        """
        scores, pooled = self._scores(tile)
        top = scores.amax(dim=(-1, -2), keepdim=True)
        weights = scores.sub_(top).exp_()
        values = weights.transpose(2, 3) @ self.values
        return values, weights.sum(-1), pooled.sub_(top[..., 0]).exp_()

    def attend_apart(self, tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Like `attend`, but each block relative to its own largest score.

        Returns:
            Mean values [B, H, KB, bq, D], and logarithms of the sums and of the means' weights.
        """
        scores, pooled = self._scores(tile)
        top = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1)
        values = weights.div_(total[..., None]).transpose(2, 3) @ self.values
        return values, top[..., 0] + total.log(), pooled

    def _scores(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, bq, KB, block] of the keys, and [B, H, bq, KB] of their means, log of n added."""
        batch, heads, key_blocks, block, _ = self.keys.shape
        scores = tile @ self.keys.flatten(2, 3).transpose(-1, -2)
        scores = scores.view(batch, heads, -1, key_blocks, block)
        scores[..., -1, int(self.lengths[-1]) :] = float("-inf")
        pooled = tile @ self.key_means.transpose(-1, -2)
        return scores, pooled.add_(self.lengths.log())


def _key_blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] -> [B, H, KB, block, D], zeros past the end."""
    batch, heads, n, dim = x.shape
    return F.pad(x, (0, 0, 0, -n % block)).view(batch, heads, -1, block, dim)


@dataclass(frozen=True)
class _Blocks:
    """What candidates keep: [C, QB, KB] for all, then [B, H, S, QB, KB] by sample and head."""

    keep: Tensor
    chosen: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """C + S, QB and KB."""
        more = 0 if self.chosen is None else self.chosen.shape[2]
        return (len(self.keep) + more, self.keep.shape[1], self.keep.shape[2])

    def row(self, i: int) -> Tensor:
        """0 or 1 for a query block, float32 [C, KB] or [B, H, C + S, KB]."""
        keep = self.keep[:, i].float()
        if self.chosen is None:
            return keep
        chosen = self.chosen[..., i, :].float()
        return torch.cat([keep.expand(*chosen.shape[:2], -1, -1), chosen], 2)


@dataclass
class _Tile:
    """What one query block shows; squared values summed over channels, float32.

    `dropped` and `mean` [B, H, C, bq], `norm` [B, H, bq], kept mass `kept` [B, H, C, bq], block
    mass `share` [B, H, bq, KB].
    """

    dropped: Tensor
    mean: Tensor
    norm: Tensor
    kept: Tensor
    share: Tensor

    @classmethod
    def of(cls, tile: Tensor, keys: _Keys, keep: Tensor) -> _Tile:
        """Candidates `keep`, 0 or 1, [C, KB] or [B, H, C, KB]."""
        values, weight, stand_in = keys.attend(tile)
        total = weight.sum(-1)[:, :, None]
        share = weight / total.transpose(-1, -2)
        dense = values.sum(2) / total.transpose(-1, -2)
        kept = keep @ share.transpose(-1, -2)
        sums = (keep @ values.flatten(3)).view(*kept.shape, values.shape[-1])
        dropped = _distance(sums, kept * total, dense)
        left = (1 - keep)[..., None, :] * stand_in[:, :, None]
        sums += left @ keys.value_means[:, :, None]
        mean = _distance(sums, kept * total + left.sum(-1), dense)
        return cls(dropped, mean, dense.square().sum(-1), kept, share)

    @classmethod
    def exactly(cls, tile: Tensor, keys: _Keys, keep: Tensor) -> _Tile:
        """The same for kept masses of any smallness: one softmax over blocks per candidate."""
        values, lse, pooled = keys.attend_apart(tile)
        share = lse.softmax(-1)
        dense = torch.einsum("bhkqd,bhqk->bhqd", values, share)
        own = keep.bool()[..., None, :]
        alone = torch.where(own, lse[:, :, None], float("-inf")).softmax(-1).nan_to_num_(0.0)
        both = torch.where(own, lse[:, :, None], pooled[:, :, None]).softmax(-1)
        outputs = [torch.einsum("bhcqk,bhkqd->bhcqd", w, values) for w in (alone, both * own)]
        outputs[1] += (both * ~own) @ keys.value_means[:, :, None]
        dropped, mean = ((x - dense[:, :, None]).square().sum(-1) for x in outputs)
        kept = keep @ share.transpose(-1, -2)
        return cls(dropped, mean, dense.square().sum(-1), kept, share)


def _distance(sums: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
    """``|sums / weights - dense|^2`` over channels [B, H, C, bq], and |dense|^2 for weight 0."""
    apart = torch.addcmul(sums, weights[..., None], dense[:, :, None], value=-1)
    error = (torch.linalg.vector_norm(apart, dim=-1) / weights).square_()
    return torch.where(weights > 0, error, dense.square().sum(-1)[:, :, None])


@dataclass
class _Sums:
    """Sums over batch and queries, float64 on their device, as in `CandidateErrors`; kept [h, C].

    `lowest` is the smallest mass that a candidate with blocks keeps of a query.
    """

    dropped: Tensor
    mean: Tensor
    norm: Tensor
    kept: Tensor
    mass: Tensor
    lowest: Tensor

    @classmethod
    def over(
        cls, q: Tensor, keys: _Keys, blocks: _Blocks, block_q: int, scale: float, *, exact: bool
    ) -> _Sums:
        """Go through the query blocks."""
        heads, n_q = q.shape[1:3]
        candidates, query_blocks, key_blocks = blocks.sizes
        zeros = q.new_zeros(heads, candidates, dtype=torch.float64)
        sums = cls(
            *(zeros, zeros.clone(), q.new_zeros(heads, dtype=torch.float64), zeros.clone()),
            mass=q.new_zeros(heads, query_blocks, key_blocks, dtype=torch.float32),
            lowest=q.new_ones((), dtype=torch.float32),
        )
        for i, start in enumerate(range(0, n_q, block_q)):
            own = blocks.row(i)
            tile = q[:, :, start : start + block_q].float() * scale
            found = (_Tile.exactly if exact else _Tile.of)(tile, keys, own)
            sums.mass[:, i] = found.share.mean(dim=(0, 2))
            sums.norm += found.norm.sum(dim=(0, 2), dtype=torch.float64)
            for name in ("dropped", "mean", "kept"):
                value = getattr(found, name).sum(dim=(0, 3), dtype=torch.float64)
                getattr(sums, name).add_(value)
            some = own.any(-1)[..., None]
            kept = found.kept.masked_fill(~some, 1.0)
            if kept.numel():
                sums.lowest = torch.minimum(sums.lowest, kept.amin())
        return sums

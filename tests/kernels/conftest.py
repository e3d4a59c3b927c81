"""Cases of block-sparse attention with dense fp64 truths and derived error bounds.

`build` makes lists and options from dense masks, which then serve as the truth: nothing of the
package takes part in it. `Case.truth` and `Case.gradients` also bound, number by number, what an
implementation with float32 accumulation and weights rounded to q's dtype may lose; the bounds
follow from the arithmetic's unit roundoffs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention import lists, pooling
from ditopt.kernels.block_sparse_attention.lists import Partial, Pooled

W = 2.0**-23  # float32 steps, truncated or rounded, in any order


class Bounded(NamedTuple):
    """A true value and how far from it each number may lie."""

    value: Tensor
    bound: Tensor

    def holds(self, x: Tensor) -> bool:
        """Equal infinities are equal; NaN never passes."""
        x = x.double().cpu()
        return bool(((x == self.value) | ((x - self.value).abs() <= self.bound)).all())


@dataclass
class Case:
    """Operands, lists and options, and the dense mask they stand for."""

    q: Tensor
    k: Tensor
    v: Tensor
    counts: Tensor
    ids: Tensor
    block_q: int
    block_k: int
    scale: float
    partial: Partial | None
    lengths: Tensor | None
    key_bias: Tensor | None
    pooled: Pooled | None
    mask: Tensor  # [1|B, 1|H, N_q, N_k + P]

    @property
    def args(self) -> tuple:
        """All of `reference.block_sparse_attention_with_lse`'s arguments."""
        operands = (self.q, self.k, self.v, self.counts, self.ids, self.block_q, self.block_k)
        return (*operands, self.scale, self.partial, self.lengths, self.key_bias, self.pooled)

    def to(self, device: str) -> Case:
        def move(x: object) -> object:
            if isinstance(x, Partial | Pooled):
                return type(x)(*(y.to(device) for y in x))
            return x.to(device) if isinstance(x, Tensor) else x

        mask = self.mask
        return Case(
            **{name: move(x) for name, x in vars(self).items() if name != "mask"}, mask=mask
        )

    def _dense(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, keys, values with pooled tokens, and biases, in fp64."""
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        bias = torch.zeros(1, 1, k.shape[2], dtype=torch.float64)
        if self.key_bias is not None:
            bias = self.key_bias.double()
        if self.pooled is not None:
            k = torch.cat([k, self.pooled.k.double()], 2)
            v = torch.cat([v, self.pooled.v.double()], 2)
            extra = self.pooled.bias.double()
            shape = torch.broadcast_shapes(bias.shape[:2], extra.shape[:2])
            bias = torch.cat([bias.expand(*shape, -1), extra.expand(*shape, -1)], -1)
        return q, k, v, bias

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and LSE in fp64, and the relative error of a row's weights before rounding."""
        q, k, _, bias = self._dense()
        scores = q @ k.transpose(-1, -2) * self.scale + bias[..., None, :]
        size = q.abs() @ k.abs().transpose(-1, -2) * abs(self.scale) + bias.abs()[..., None, :]
        seen = self.mask & (scores > -math.inf)
        scores = scores.masked_fill(~seen, -math.inf)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
        size = size.masked_fill(~seen, 0.0).amax(-1, keepdim=True)
        tiles = scores.shape[-1] / 16 + 1  # each rescales what was summed
        error = torch.expm1(2 * W * ((q.shape[-1] + 4) * size + 4 * (1 + size)) + 4 * W * tiles)
        return weights, lse, error

    def truth(self) -> tuple[Bounded, Bounded]:
        """(out, LSE)."""
        _, _, v, _ = self._dense()
        weights, lse, error = self._weights()
        u, least = roundoff(self.q.dtype)
        n = weights.shape[-1]
        out, size = weights @ v, weights @ v.abs()
        sums = error + n * W
        relative = ((1 + sums) * (1 + u) - 1 + sums) / (1 - sums)
        bound = relative * size + u * (1 + relative) * out.abs()
        bound = bound + least * (1 + v.abs().sum(-2, keepdim=True))
        lse_bound = sums[..., 0] + W * (lse.abs() + tiles_of(n))
        return Bounded(out, bound), Bounded(lse, torch.where(lse.isinf(), 0.0, lse_bound))

    def gradients(self, grad_out: Tensor, grad_lse: Tensor) -> list[Bounded]:
        """Those of q, k, v and, where there are any, pooled k and v; given rounded out and LSE."""
        q, k, v, _ = self._dense()
        weights, lse, error = self._weights()
        u, least = roundoff(self.q.dtype)
        upstream = grad_out.double()
        d = q.shape[-1]
        out = weights @ v
        lse_error = W * torch.where(lse.isinf(), 0.0, lse.abs())[..., None]
        error = torch.expm1(torch.log1p(error) + 2 * lse_error)
        delta = ((upstream * out).sum(-1) - grad_lse.double())[..., None]
        delta_size = (upstream.abs() * out.abs()).sum(-1, keepdim=True)
        delta_error = (u + (d + 2) * W) * delta_size + W * delta.abs()
        dp = upstream @ v.transpose(-1, -2)
        dp_error = (d + 2) * W * (upstream.abs() @ v.abs().transpose(-1, -2))
        ds = weights * (dp - delta)
        ds_error = error * ds.abs() + (1 + error) * weights * (dp_error + delta_error)
        rounds = u + max(q.shape[2], k.shape[2]) * W
        ds_error = ds_error * (1 + rounds) + rounds * ds.abs() + least
        p_error = weights * ((1 + error) * (1 + rounds) - 1) + least
        scale = abs(self.scale)
        found = [
            Bounded(ds @ k * self.scale, ds_error @ k.abs() * scale),
            Bounded(ds.mT @ q * self.scale, ds_error.mT @ q.abs() * scale),
            Bounded(weights.mT @ upstream, p_error.mT @ upstream.abs()),
        ]
        found = [Bounded(x, bound * (1 + u) + u * x.abs() + least) for x, bound in found]
        if self.pooled is None:
            return found
        n_k = self.k.shape[2]
        (dq, dk, dv) = found
        own = [Bounded(x.value[:, :, :n_k], x.bound[:, :, :n_k]) for x in (dk, dv)]
        return [dq, *own, *(Bounded(x.value[:, :, n_k:], x.bound[:, :, n_k:]) for x in (dk, dv))]


def tiles_of(n: int) -> float:
    return n / 16 + 1


def roundoff(dtype: torch.dtype) -> tuple[float, float]:
    """Unit roundoff, and what the smallest numbers lose."""
    info = torch.finfo(dtype)
    return max(info.eps / 2, W / 2), info.tiny * info.eps / 2


def blockwise(kinds: Tensor, n: int, m: int, block_q: int, block_k: int) -> Tensor:
    """[.., QB, KB] repeated to tokens [.., n, m]."""
    rows = kinds.repeat_interleave(block_q, -2)[..., :n, :]
    return rows.repeat_interleave(block_k, -1)[..., :m]


def build(
    shape: tuple[int, ...],
    options: str = "",
    dtype: torch.dtype = torch.float64,
    list_batch: int = 1,
    list_heads: int | None = None,
    seed: int = 0,
) -> Case:
    """A case of (batch, heads, n_q, n_k, head size, block_q, block_k).

    ``options``: p partial blocks, l lengths, b biases, m block means, w other pooled tokens. There
    are an empty row, a row of one block and a full row where there are enough.
    """
    torch.manual_seed(seed)
    batch, heads, n_q, n_k, d, block_q, block_k = shape
    rows, width = -(-n_q // block_q), -(-n_k // block_k)
    list_heads = heads if list_heads is None else list_heads
    kinds = torch.randint(0, 3 if "p" in options else 2, (list_batch, list_heads, rows, width))
    flat = kinds.view(-1, width)
    if len(flat) > 2:
        flat[0], flat[1], flat[2] = 0, (torch.arange(width) == width - 1).long(), 1
    tokens = blockwise(kinds, n_q, n_k, block_q, block_k)
    some = torch.rand(tokens.shape) < 0.5
    mask = torch.where(tokens == 2, some, tokens == 1)
    counts, ids, partial = lists.from_token_mask(mask, block_q, block_k)
    q, k, v = (
        torch.randn(batch, n, heads, d, dtype=torch.float64).to(dtype).transpose(1, 2)
        for n in (n_q, n_k, n_k)
    )
    lengths = bias = pooled = None
    if "l" in options:
        lengths = torch.randint(0, block_k + 1, (width,), dtype=torch.int32)
        place = torch.arange(width * block_k)[:n_k]
        mask = mask & (place % block_k < lengths[place // block_k])
    if "b" in options:
        bias = torch.randn(1, heads, n_k)
        bias[..., ::7] = -math.inf
    if "m" in options:
        pooled = pooling.mean_substitute(k, v, counts, ids, block_k, partial, lengths)
        off = torch.ones(kinds.shape, dtype=torch.bool)
        for a, b, i, j in (kinds != 0).nonzero().tolist():
            block = tokens[a, b, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            listed = block[0, 0] == 1
            at = (slice(i * block_q, (i + 1) * block_q), slice(j * block_k, (j + 1) * block_k))
            off[a, b, i, j] = not bool(listed | some[a, b][at].any())
        mask = torch.cat([mask, blockwise(off, n_q, width, block_q, 1)], -1)
    if "w" in options:
        seen = torch.rand(1, heads, rows, 37) < 0.3
        pooled_k, pooled_v = torch.randn(2, batch, heads, 37, d, dtype=torch.float64).to(dtype)
        weights = torch.randn(batch, 1, 37)
        pooled = Pooled(pooled_k, pooled_v, weights, lists.pack_bits(seen))
        seen = blockwise(seen, n_q, 37, block_q, 1)
        shape_of_both = torch.broadcast_shapes(mask.shape[:2], seen.shape[:2])
        mask = torch.cat([x.expand(*shape_of_both, -1, -1) for x in (mask, seen)], -1)
    return Case(
        q, k, v, counts, ids, block_q, block_k, d**-0.5, partial, lengths, bias, pooled, mask
    )  # fmt: skip


@pytest.fixture(scope="session")
def build_case() -> Callable[..., Case]:
    return build

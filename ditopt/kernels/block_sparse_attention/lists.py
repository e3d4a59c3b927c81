"""Lists of key blocks: what they may carry besides ids, how they are made, kept and transposed.

A list says for each (batch, head, query block) which key blocks it attends to: ``kv_num_blocks``
int32 [Bl, Hl, QB] and ``kv_indices`` int32 [Bl, Hl, QB, KB], ids ascending, Bl in {1, B} and Hl in
{1, H}. These are FlexAttention's "full" blocks. `Partial` is its second list, of blocks of which
only some pairs exist; the pairs are bits, and equal blocks (of a band, all blocks on one diagonal)
share one entry of the bit table. `Pooled` holds tokens that stand for blocks on neither list.

Everything here is plain PyTorch on the lists' device and, where not said otherwise, waits for
nothing. Sources: attention.md sections 5.1 and A2; PyTorch's ``BlockMask`` for the layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 32


class Partial(NamedTuple):
    """Blocks with masks: ids as in ``kv_indices``, and for each entry a row of the bit table.

    ``num_blocks`` int32 [Bl, Hl, QB]; ``indices`` and ``mask_ids`` int32 [Bl, Hl, QB, PB];
    ``masks`` int32 [M, block_q, ceil(block_k / 32)]: bit c % 32 of word c // 32 says whether the
    block's query r sees its key c. Costs block_q * block_k / 8 bytes per *different* block.
    """

    num_blocks: Tensor
    indices: Tensor
    mask_ids: Tensor
    masks: Tensor


class Pooled(NamedTuple):
    """P tokens beside the keys, each with a weight: see `pooling`.

    ``k`` and ``v`` [B, H, P, D] in q's dtype; ``bias`` float32 [1|B, 1|H, P] is added to their
    scores (the logarithm of the weight); ``bits`` int32 [Bl, Hl, QB, ceil(P / 32)] says which of
    them each query block sees.
    """

    k: Tensor
    v: Tensor
    bias: Tensor
    bits: Tensor


class Transposed(NamedTuple):
    """Entries of a list by key block: those of block j are ``entries[starts[j] : starts[j + 1]]``.

    ``starts`` int32 [Bl, Hl, KB + 1]; ``entries`` int32 [Bl, Hl, QB * width]: query block * width +
    place in its list, ascending, so that sums over them have one order.
    """

    starts: Tensor
    entries: Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [..., n] as int32 [..., ceil(n / 32)], lowest bit first."""
    missing = -bits.shape[-1] % WORD
    words = torch.nn.functional.pad(bits, (0, missing)).reshape(*bits.shape[:-1], -1, WORD).long()
    packed: Tensor = (words << torch.arange(WORD, device=bits.device)).sum(-1)
    return (packed - ((packed >> 31) << 32)).int()  # bit 31 is the sign


def unpack_bits(words: Tensor, n: int) -> Tensor:
    """Int32 [..., W] as bool [..., n]; the inverse of `pack_bits`."""
    shifts = torch.arange(WORD, device=words.device, dtype=torch.int32)
    return (((words[..., None] >> shifts) & 1) != 0).flatten(-2)[..., :n]


def from_blocks(keep: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Bool [Bl, Hl, QB, KB] as (counts, ids); ``width`` cuts the ids' last axis."""
    key_blocks = keep.shape[-1]
    numbers = torch.arange(key_blocks, device=keep.device, dtype=torch.int32)
    ids = torch.where(keep, numbers, key_blocks).sort(-1).values[..., :width]
    return keep.sum(-1, dtype=torch.int32), torch.where(ids < key_blocks, ids, 0)


def to_blocks(counts: Tensor, ids: Tensor, key_blocks: int) -> Tensor:
    """(counts, ids) as bool [Bl, Hl, QB, ``key_blocks``]; ids outside are ignored."""
    used = torch.arange(ids.shape[-1], device=ids.device) < counts[..., None]
    used &= (ids >= 0) & (ids < key_blocks)
    keep = torch.zeros(*ids.shape[:3], key_blocks + 1, dtype=torch.bool, device=ids.device)
    keep.scatter_(-1, torch.where(used, ids, key_blocks).long(), value=True)
    return keep[..., :key_blocks]


def keep_text(
    counts: Tensor,
    ids: Tensor,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    *,
    before: int = 0,
    after: int = 0,
) -> tuple[Tensor, Tensor]:
    """The lists with text always kept: as keys of every query, and as queries of every key.

    ``before`` and ``after`` count the tokens that precede and follow the image or video tokens, in
    queries and keys alike; a block that holds one of them is kept whole. The ids become ceil(n_k /
    block_k) wide.
    """
    keep = to_blocks(counts, ids, -(-n_k // block_k))
    first_q, last_q = _text_blocks(n_q, block_q, before, after)
    first_k, last_k = _text_blocks(n_k, block_k, before, after)
    keep[..., :first_q, :] = True
    keep[..., last_q:, :] = True
    keep[..., :first_k] = True
    keep[..., last_k:] = True
    return from_blocks(keep)


def _text_blocks(n: int, block: int, before: int, after: int) -> tuple[int, int]:
    """How many blocks hold leading text, and which block is the first with trailing text."""
    if before < 0 or after < 0 or before + after > n:
        name = "before" if before < 0 or before > n else "after"
        raise ValueError(f"{name}: {before} + {after} text tokens do not fit {n} tokens")
    return -(-before // block), (n - after) // block if after else -(-n // block)


def from_token_mask(
    mask: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Partial | None]:
    """Bool [Bl, Hl, N_q, N_k] as full blocks (counts, ids) and exactly masked partial ones.

    For a mask that is known once per shape: it is read whole and waited for. Equal masks of partial
    blocks are stored once. Tokens that do not exist in ragged last blocks count as kept.
    """
    if mask.ndim != 4 or mask.dtype != torch.bool:
        raise ValueError(
            f"mask: must be bool [batch, head, query, key], got {mask.dtype} {list(mask.shape)}"
        )
    some = _pad(mask, block_q, block_k, value=False)
    whole = _pad(mask, block_q, block_k, value=True)
    full = whole.all(-1).all(-1)
    partial = some.any(-1).any(-1) & ~full
    counts, ids = from_blocks(full, max(1, int(full.sum(-1).max())))
    if not bool(partial.any()):
        return counts, ids, None
    masks, which = torch.unique(pack_bits(some[partial]), dim=0, return_inverse=True)
    numbers = torch.zeros(partial.shape, dtype=torch.int32, device=mask.device)
    numbers[partial] = which.int()
    partial_counts, partial_ids = from_blocks(partial, int(partial.sum(-1).max()))
    mask_ids = numbers.gather(-1, partial_ids.long())
    return counts, ids, Partial(partial_counts, partial_ids, mask_ids, masks)


def _pad(mask: Tensor, block_q: int, block_k: int, *, value: bool) -> Tensor:
    """[Bl, Hl, N_q, N_k] as blocks [Bl, Hl, QB, KB, block_q, block_k], the missing part ``value``.

    A query row beyond N_q decides nothing: it repeats ``value``.
    """
    missing = (0, -mask.shape[3] % block_k, 0, -mask.shape[2] % block_q)
    mask = torch.nn.functional.pad(mask, missing, value=value)
    batch, heads, rows, columns = mask.shape
    blocks = mask.view(batch, heads, rows // block_q, block_q, columns // block_k, block_k)
    return blocks.transpose(3, 4)


def transpose(counts: Tensor, ids: Tensor, key_blocks: int) -> Transposed:
    """The list by key block, through a stable sort; ids outside [0, key_blocks) are left out."""
    used = torch.arange(ids.shape[-1], device=ids.device) < counts[..., None]
    used &= (ids >= 0) & (ids < key_blocks)
    keys = torch.where(used, ids, key_blocks).flatten(2)
    in_order, entries = keys.sort(stable=True)
    blocks = torch.arange(key_blocks + 1, device=ids.device, dtype=torch.int32)
    starts = torch.searchsorted(in_order, blocks.expand(*in_order.shape[:2], -1).contiguous())
    return Transposed(starts.int(), entries.int())

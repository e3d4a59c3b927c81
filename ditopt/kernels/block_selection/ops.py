"""The selector operators: schemas, fake implementations, device dispatch.

``ditopt::select_blocks_pooled`` and ``ditopt::select_blocks_mass`` return the (counts, ids) that
`block_sparse_attention` takes; ``ditopt::block_mass`` returns the mass itself. CPU runs
`reference`, CUDA runs `triton` (imported on the first launch), except for float64 and for rows of
more key blocks than one program holds. No call waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

MAX_KEY_BLOCKS = 16384  # of a row that one program of the kernel holds

_RULE = "int block_q, int block_k, str rule, float amount, int minimum, float scale"
_POOLED = "ditopt::select_blocks_pooled"
_MASS = "ditopt::block_mass"
_SELECT_MASS = "ditopt::select_blocks_mass"
torch.library.define(_POOLED, f"(Tensor q, Tensor k, Tensor forced, {_RULE}) -> (Tensor, Tensor)")
torch.library.define(
    _MASS, "(Tensor q, Tensor k, Tensor lse, int block_q, int block_k, float scale) -> Tensor"
)
torch.library.define(
    _SELECT_MASS, f"(Tensor q, Tensor k, Tensor lse, Tensor forced, {_RULE}) -> (Tensor, Tensor)"
)
torch.library.impl(_POOLED, "cpu")(reference.select_pooled)
torch.library.impl(_MASS, "cpu")(reference.block_mass)
torch.library.impl(_SELECT_MASS, "cpu")(reference.select_mass)


def _on_reference(k: Tensor, block_k: int) -> bool:
    return k.dtype == torch.float64 or -(-k.shape[2] // block_k) > MAX_KEY_BLOCKS


@torch.library.impl(_POOLED, "cuda")
def _select_pooled(
    q: Tensor, k: Tensor, forced: Tensor, block_q: int, block_k: int,
    rule: str, amount: float, minimum: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _on_reference(k, block_k):
        return reference.select_pooled(q, k, forced, block_q, block_k, rule, amount, minimum, scale)
    from . import triton  # Triton is imported on the first launch only

    scores = reference.score_means(pooled(q, block_q), pooled(k, block_k), scale)
    return triton.choose(scores, k.shape[2], block_k, forced, rule, amount, minimum)


@torch.library.impl(_MASS, "cuda")
def _block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, scale: float
) -> Tensor:
    if k.dtype == torch.float64:
        return reference.block_mass(q, k, lse, block_q, block_k, scale)
    from . import triton  # Triton is imported on the first launch only

    return triton.block_mass(q, k, lse, block_q, block_k, scale)


@torch.library.impl(_SELECT_MASS, "cuda")
def _select_mass(
    q: Tensor, k: Tensor, lse: Tensor, forced: Tensor, block_q: int, block_k: int,
    rule: str, amount: float, minimum: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _on_reference(k, block_k):
        return reference.select_mass(
            q, k, lse, forced, block_q, block_k, rule, amount, minimum, scale
        )
    from . import triton  # Triton is imported on the first launch only

    mass = triton.block_mass(q, k, lse, block_q, block_k, scale)
    scores, _ = reference.score_mass(mass, k.shape[2], block_k)
    return triton.choose(scores, k.shape[2], block_k, forced, rule, amount, minimum)


def pooled(x: Tensor, block: int) -> Tensor:
    """Means of blocks, float32 or float64, by the kernel of x's device: `reference.pool`."""
    if not x.is_cuda or x.dtype == torch.float64:
        return reference.pool(x, block)
    from . import triton  # Triton is imported on the first launch only

    return triton.pool(x, block)


def fake_lists(q: Tensor, k: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Uninitialised counts [B, H, QB] and ids [B, H, QB, KB]."""
    rows = (q.shape[2] + block_q - 1) // block_q
    width = (k.shape[2] + block_k - 1) // block_k
    shape = (q.shape[0], q.shape[1], rows)
    return (
        q.new_empty(shape, dtype=torch.int32),
        q.new_empty((*shape, width), dtype=torch.int32),
    )


def _fake_pooled(
    q: Tensor, k: Tensor, forced: Tensor, block_q: int, block_k: int,
    rule: str, amount: float, minimum: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_lists(q, k, block_q, block_k)


def _fake_select_mass(
    q: Tensor, k: Tensor, lse: Tensor, forced: Tensor, block_q: int, block_k: int,
    rule: str, amount: float, minimum: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_lists(q, k, block_q, block_k)


def _fake_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, scale: float
) -> Tensor:
    _, ids = fake_lists(q, k, block_q, block_k)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(ids.shape, dtype=dtype)


torch.library.register_fake(_POOLED, _fake_pooled)
torch.library.register_fake(_SELECT_MASS, _fake_select_mass)
torch.library.register_fake(_MASS, _fake_mass)

"""Fingerprints of a model: what its parameters are called and shaped, and what they hold."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_SAMPLES = 1024
"""Values of each tensor that are hashed; retraining, merging a LoRA or loading changes them."""


def architecture_fingerprint(model: nn.Module) -> str:
    """sha256 over the name, shape and dtype of every parameter and buffer."""
    lines = (f"{name} {tuple(t.shape)} {t.dtype}\n" for name, t in _tensors(model))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over at most 1,024 evenly spread values of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        flat = tensor.detach().flatten()
        picked = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].contiguous().cpu()
        digest.update(name.encode())
        digest.update(picked.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0])

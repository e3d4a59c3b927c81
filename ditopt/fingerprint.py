"""Fingerprints of a model: what it is made of, and what its weights are."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_SAMPLES = 16


def architecture(model: nn.Module) -> str:
    """sha256 over names, shapes and dtypes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    return digest.hexdigest()


def weights(model: nn.Module) -> str:
    """sha256 over a few values of every parameter: cheap, and a fine-tuned model differs."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLES)
        picked = flat[::stride][:_SAMPLES].to("cpu", torch.float64)
        digest.update(name.encode())
        digest.update(picked.contiguous().numpy().tobytes())
    return digest.hexdigest()

"""The forecast of a skipped block stack: one weighted sum of stored tensors."""

from .api import forecast

__all__ = ["forecast"]

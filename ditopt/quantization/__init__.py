"""Number formats for linear layers: arithmetic, transforms before it, and what each layer lost."""

from ditopt.quantization.rule import LinearRule

__all__ = ["LinearRule"]

"""The forecast of a skipped block stack: one weighted sum, in fp32, for every forecaster."""

from ditopt.kernels.forecast import forecast

__all__ = ["forecast"]

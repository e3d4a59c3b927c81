"""What a plan says about the matrix products of one attention."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ditopt.kernels.block_sparse_attention.reference_8bit import Arithmetic


class ArithmeticRule(BaseModel):
    """Attention in 8 bits; see `kernels.block_sparse_attention.reference_8bit`.

    Attributes:
        kind: `int8_qk` multiplies queries and keys as integers, `int8_qk_e4m3_pv` also
            probabilities and values, in e4m3.
        simulate: allowed to compute the same numbers by the reference where the device lacks the
            kernel; far slower than the attention that it replaces, and reported so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Arithmetic
    simulate: bool = False

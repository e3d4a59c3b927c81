"""What a bench measured: one row per variant, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ditopt.errors import VerificationError


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        variant: `eager`, `inductor`, `ditopt`, `ditopt+plan`, `engine`.
        ms: median time of one whole sampling loop; None when withheld.
        ms_iqr: its interquartile range.
        psnr_db: mean over seeds against eager; None where every seed is equal bit for bit.
        psnr_min_db: the worst seed.
        ssim: mean over seeds, on the last two axes.
        max_error: largest absolute difference over seeds.
        compile_s: seconds of the first loop, with empty compiler caches, beyond a median one.
        peak_bytes: CUDA: most memory that tensors took; CPU: peak resident set of the process.
        seeds: the seeds that were sampled.
        ran: how often each path ran over all rounds, from `ditopt.stats`.
    """

    variant: str
    ms: float | None
    ms_iqr: float | None
    psnr_db: float | None
    psnr_min_db: float | None
    ssim: float
    max_error: float
    compile_s: float
    peak_bytes: int | None
    seeds: tuple[int, ...]
    ran: Mapping[str, Any]


@dataclass(frozen=True)
class BenchResult:
    """The rows in the order they ran first, where they were measured, and what failed the gate."""

    environment: Mapping[str, Any]
    rows: tuple[Row, ...]
    failures: tuple[str, ...]

    def row(self, variant: str) -> Row:
        """The row of one variant."""
        return next(row for row in self.rows if row.variant == variant)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `ditopt bench --json` writes them."""
        return {
            "environment": dict(self.environment),
            "rows": [{**asdict(row), "seeds": list(row.seeds)} for row in self.rows],
            "failures": list(self.failures),
        }

    def check(self) -> None:
        """Raise VerificationError when the correctness gate failed."""
        if self.failures:
            raise VerificationError("; ".join(self.failures), remedy="Speeds are withheld.")

"""`SearchRecord`: what a search predicted and sampled, kept beside the profile for reports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ditopt import files
from ditopt.errors import ProfileError

RECORD_NAME = "search.json"

_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Trial(_Part):
    """One plan that was sampled.

    Attributes:
        purpose: `tune` or `audit`.
        seeds: that were sampled.
        predicted_psnr_db: before sampling; null where no error was predicted.
        measured_psnr_db: of each seed.
        measured_ssim: of each seed; empty where it was not measured.
        predicted_seconds, predicted_speedup: of one loop.
        measured_seconds: of one loop, median over seeds.
        full_calls: that compute the block stack.
        density: kept fraction of attention blocks.
        adopted: whether it is the plan that was written.
    """

    purpose: Literal["tune", "audit"]
    seeds: tuple[int, ...]
    predicted_psnr_db: _Number | None
    measured_psnr_db: tuple[_Number, ...]
    measured_ssim: tuple[_Number, ...] = ()
    predicted_seconds: _Number
    predicted_speedup: _Number
    measured_seconds: _Number
    full_calls: int
    density: _Number
    adopted: bool


class FrontierPoint(_Part):
    """The fastest plan that is predicted to keep a quality.

    Attributes:
        predicted_speedup, predicted_psnr_db: by the model as the last trial left it.
        full_calls, density: as in `Trial`.
    """

    predicted_speedup: _Number
    predicted_psnr_db: _Number
    full_calls: int
    density: _Number


class SearchRecord(_Part):
    """One search.

    Attributes:
        goal: in words.
        trials: in order.
        frontier: fastest plans by predicted quality, best quality first.
        plan_sha256: of the adopted plan's text; null where nothing met the goal.
    """

    goal: str
    trials: tuple[Trial, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    plan_sha256: str | None = None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write search.json atomically."""
        files.write_json(Path(folder) / RECORD_NAME, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self | None:
        """The record of the last search, or None where there was none.

        Raises:
            ProfileError: malformed.
        """
        path = Path(folder) / RECORD_NAME
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(files.read_text(path))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ProfileError(
                f"{RECORD_NAME}: {where}: {first['msg']}", remedy=f"Delete {RECORD_NAME}."
            ) from error

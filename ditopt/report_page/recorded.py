"""`search.json`, as the search writes it: every sampled plan, and the frontier of predictions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ditopt import files
from ditopt.errors import ProfileError

SEARCH_NAME = "search.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Trial(_Part):
    """One plan that was sampled."""

    purpose: Literal["tune", "audit"]
    seeds: tuple[int, ...]
    predicted_psnr_db: float
    measured_psnr_db: tuple[float, ...]
    predicted_seconds: float
    predicted_speedup: float
    measured_seconds: float
    full_calls: int
    density: float
    adopted: bool


class FrontierPoint(_Part):
    """One plan that no other is predicted to beat in both speed and quality."""

    predicted_speedup: float
    predicted_psnr_db: float
    full_calls: int
    density: float


class SearchRecord(_Part):
    """One search: its goal in words, what it tried, and the sha256 of the plan it adopted."""

    goal: str
    trials: tuple[Trial, ...]
    frontier: tuple[FrontierPoint, ...]
    plan_sha256: str

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self | None:
        """What a search wrote, or None where none was recorded.

        Raises:
            ProfileError: malformed.
        """
        path = Path(folder) / SEARCH_NAME
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(files.read_text(path))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ProfileError(
                f"{SEARCH_NAME}: {where}: {first['msg']}", remedy="Run `ditopt plan` again."
            ) from error

"""Types of a plan's fields: numbers that keep their text, names, and rules in a stable order."""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

_Rule = TypeVar("_Rule")
_NUMBERED = re.compile(r"(\D*)(\d*)")


def _rounded(value: float) -> float:
    """Nine significant digits: every float32 survives, and last bits do not change the text."""
    return float(f"{value:.9g}")


Float = Annotated[float, AfterValidator(_rounded), Field(allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]
Index = Annotated[int, Field(ge=0, le=1 << 31)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
FileName = Annotated[str, StringConstraints(pattern=r"^[\w\-][\w\-. ]{0,200}\.safetensors$")]


def by_call(rows: dict[int, tuple[float, ...]]) -> dict[int, tuple[float, ...]]:
    """Ascending call indices: equal rows give equal text."""
    return dict(sorted(rows.items()))


def by_site(rules: dict[str, _Rule]) -> dict[str, _Rule]:
    """In natural order, `blocks.2` before `blocks.10`: equal rules give equal text."""
    return dict(sorted(rules.items(), key=lambda rule: (_natural(rule[0]), rule[0])))


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(number or -1)) for text, number in _NUMBERED.findall(name)]


class Part(BaseModel):
    """A part of a plan: no unknown fields, no change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

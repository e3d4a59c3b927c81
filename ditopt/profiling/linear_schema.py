"""What is known about the linear layers of one workload, as a file holds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ditopt import files
from ditopt.errors import ProfileError
from ditopt.plan import LinearRecord
from ditopt.quantization import LinearRule

if TYPE_CHECKING:
    from torch import Tensor

LINEARS_NAME = "linears.json"
TENSORS_NAME = "linears.safetensors"

_Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearGroup(_Part):
    """Layers that read one tensor.

    Attributes:
        members: their ids, in execution order.
        rows: M, tokens of all samples.
        in_features: K.
        out_features: N of each member.
        error: [rules][ranges] squared error of the output over its squared norm.
        outliers: of the input over all calls, see `InputStatistics.outliers`; `fluctuation` is
            LRQ-DiT's criterion, `quantization.statistics.fluctuation`.
        range_amax: largest magnitude of the input in each range; the scale of a static format.
        direction_error: [rules][ranges] mean over output rows of 1 - cosine of the angle between
            the exact and the rounded row: what a token is told, whatever its size.
    """

    members: tuple[str, ...]
    rows: int
    in_features: int
    out_features: tuple[int, ...]
    error: tuple[tuple[_Error, ...], ...]
    outliers: dict[str, float]
    range_amax: tuple[float, ...]
    direction_error: tuple[tuple[_Error, ...], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, K and the members' N together."""
        return (self.rows, self.in_features, sum(self.out_features))

    @property
    def range_ratio(self) -> float:
        """Largest over smallest `range_amax`: above 4, one static scale is unsafe."""
        return max(self.range_amax) / max(min(self.range_amax), 1e-30)


class LinearCost(_Part):
    """Measured time of one shape [M, K, N], as it is and by format, rounding included."""

    shape: tuple[int, int, int]
    plain_ms: _Milliseconds
    format_ms: dict[str, _Milliseconds]


class LinearProfile(_Part):
    """What is known about the linear layers of one workload, but the tensors.

    Attributes:
        ditopt_linear_profile: version of this schema.
        weights: fingerprint of the model's values.
        rules: what was tried.
        ranges: half-open ranges of calls.
        groups: the layers.
        costs: one for each distinct shape; formats that the device does not multiply are left out.
        notes: what was left out, and why.
    """

    ditopt_linear_profile: Literal[1] = 1
    weights: str
    rules: tuple[LinearRule, ...]
    ranges: tuple[tuple[int, int], ...]
    groups: tuple[LinearGroup, ...]
    costs: tuple[LinearCost, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> tuple[LinearRecord, ...]:
        """The layers as a plan records them."""
        return tuple(
            LinearRecord(id=member, in_features=group.in_features, out_features=n)
            for group in self.groups
            for member, n in zip(group.members, group.out_features, strict=True)
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self | None:
        """What `profile_linears` wrote, or None where it was not run.

        Raises:
            ProfileError: malformed.
        """
        path = Path(folder) / LINEARS_NAME
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(files.read_text(path))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ProfileError(
                f"{LINEARS_NAME}: {where}: {first['msg']}", remedy="Profile the layers again."
            ) from error


def load_statistics(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors for a plan's side file, as `quantization.statistics.plan_tensors` names them."""
    return safetensors.torch.load((Path(folder) / TENSORS_NAME).read_bytes())

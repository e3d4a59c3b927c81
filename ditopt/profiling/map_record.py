"""Tensors of one seed that describe attention maps: `maps_<n>.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor

from ditopt import files
from ditopt.errors import ProfileError
from ditopt.profiling.maps import RECALL_LEVELS

if TYPE_CHECKING:
    from ditopt.profiling.schema import Profile

_NAMES = ("mass", "recall", "top", "rank", "kept", "clusters")


class MapRecord(BaseModel):
    """Attention maps of one seed, of the first guidance branch; O observed calls, H heads.

    Attributes:
        mass: per site float16 [O, H, r, c], see `HeadMaps.mass`.
        recall: float32 [O, H, R] kept density that holds each of `RECALL_LEVELS`.
        top: uint8 [O, H, bytes] packed block set at recall 0.9.
        rank: float32 [O, H] effective rank of the rest.
        kept: float32 [O, H, C] share of the attention that each option keeps.
        clusters: float32 [H, R] density over clusters of queries and keys that holds each level,
            at the observed call in the middle.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)

    mass: dict[str, Tensor]
    recall: dict[str, Tensor]
    top: dict[str, Tensor]
    rank: dict[str, Tensor]
    kept: dict[str, Tensor]
    clusters: dict[str, Tensor]

    def save(self, folder: Path, seed: int) -> None:
        """Write `maps_<n>.safetensors` atomically."""
        tensors = {
            f"{name}/{site}": tensor.contiguous()
            for name in _NAMES
            for site, tensor in getattr(self, name).items()
        }
        with files.atomic_path(maps_path(folder, seed)) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors))

    @classmethod
    def load(cls, folder: Path, seed: int, profile: Profile) -> MapRecord:
        """Read and check one seed's maps.

        Raises:
            ProfileError: missing, truncated, not finite, or of other sizes than the profile says.
        """
        path = maps_path(folder, seed)
        try:
            tensors = safetensors.torch.load(path.read_bytes())
            record = cls(
                **{
                    name: {site: tensors[f"{name}/{site}"] for site in profile.shapes}
                    for name in _NAMES
                }
            )
        except (OSError, SafetensorError, KeyError) as error:
            raise _damaged(path.name, str(error)) from error
        record._check(path.name, profile)
        return record

    def _check(self, name: str, profile: Profile) -> None:
        calls, levels = len(profile.observed_calls), len(RECALL_LEVELS)
        for site, shape in profile.shapes.items():
            seen = (calls, shape.heads)
            expected = {
                "recall": (*seen, levels),
                "rank": seen,
                "kept": (*seen, len(profile.options)),
                "clusters": (shape.heads, levels),
                "mass": (*seen, *self.mass[site].shape[2:]),
                "top": (*seen, *self.top[site].shape[2:]),
            }
            for field, sizes in expected.items():
                tensor = getattr(self, field)[site]
                if tuple(tensor.shape) != sizes or not bool(torch.isfinite(tensor.float()).all()):
                    raise _damaged(
                        name,
                        f"{field}/{site}: expected finite values of shape {sizes}, "
                        f"got shape {tuple(tensor.shape)}",
                    )


def has_maps(folder: Path, seed: int) -> bool:
    """Whether a seed's maps are there."""
    return maps_path(folder, seed).is_file()


def maps_path(folder: Path, seed: int) -> Path:
    """Where a seed's maps are."""
    return folder / f"maps_{seed}.safetensors"


def _damaged(name: str, why: str) -> ProfileError:
    return ProfileError(
        f"{name} is missing or damaged: {why}",
        remedy=f"Delete {name} and profile again; the other seeds are kept.",
    )

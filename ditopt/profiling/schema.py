"""What a profile directory holds: profile.json (version 2) and tensor files per seed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor

from ditopt import files
from ditopt.errors import FileError, ProfileError
from ditopt.kernels.block_sparse_attention.reference_8bit import Arithmetic
from ditopt.layout import TokenLayout
from ditopt.patterns import HeadPattern, Selector, density
from ditopt.plan import Block, Hardware, ModelRecord, Sampler
from ditopt.token_order import TokenOrder

PROFILE_NAME = "profile.json"

_Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Density = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Remainder = Literal["drop", "mean"]
"""What becomes of the blocks that are not kept: nothing, or their mean stands for them."""


class AttentionOption(_Part):
    """One choice at a head.

    Attributes:
        pattern: the blocks that are kept.
        order: of the tokens in the sequence, an index into `Profile.orders`.
        remainder: of the dropped blocks; with `mean`, each is one token with its mean key and
            value and the logarithm of its length added to the score.
    """

    pattern: HeadPattern
    order: int = Field(0, ge=0)
    remainder: Remainder = "drop"


class SelectorOption(_Part):
    """A choice for all heads of a site: blocks chosen from each call's data.

    Attributes:
        selector: the rule.
        remainder: of the dropped blocks, as for `AttentionOption`.
    """

    selector: Selector
    remainder: Remainder = "drop"


class SiteShape(_Part):
    """Operands of one profiled attention site: q, k and v are [batch, heads, tokens, head_dim]."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: str


class AttentionCost(_Part):
    """Measured time of one attention shape.

    Attributes:
        dense_ms: dense scaled-dot-product attention.
        sparse_ms: (density, milliseconds) of the block-sparse executor, all heads in one call.
        mean_ms: the same with the block-mean remainder; empty where it cannot run.
        select_ms: time that choosing blocks by pooled scores takes on top; null: not measured.
        arithmetic_ms: dense attention in 8-bit products; empty where the device has no kernel.
    """

    shape: SiteShape
    dense_ms: _Milliseconds
    sparse_ms: Annotated[tuple[tuple[_Density, _Milliseconds], ...], Field(min_length=2)]
    mean_ms: tuple[tuple[_Density, _Milliseconds], ...] = ()
    select_ms: _Milliseconds | None = None
    arithmetic_ms: dict[Arithmetic, _Milliseconds] = Field(default_factory=dict)


class Costs(_Part):
    """Times on the profile's hardware.

    Attributes:
        source: `measured`, or computed from a device's peak rates (`roofline`).
        dense_call_ms: one compiled call of the model that computes everything.
        skip_call_ms: one call that forecasts the block stack.
        attention: one table for each distinct shape of profiled sites.
        reused: how many of those an earlier profile on this machine measured.
    """

    dense_call_ms: _Milliseconds
    skip_call_ms: _Milliseconds
    attention: tuple[AttentionCost, ...]
    source: Literal["measured", "roofline"] = "measured"
    reused: int = Field(0, ge=0)


class Profile(_Part):
    """Everything measured about one workload but the tensors.

    Attributes:
        ditopt_profile: version of this schema.
        model: the model and all its attention sites.
        sampler: its denoising loop.
        hardware: where costs were measured.
        layout: token grid, or null where it is unknown.
        block: block sizes that the candidates were rounded up to.
        options: choices whose errors were measured, the same for every profiled site.
        orders: token orders that options name; the first is None, the model's own.
        selectors: choices for all heads of a site whose errors were measured.
        arithmetics: 8-bit products of dense attention whose errors were measured.
        shapes: operands of each profiled site; sites not listed stay dense.
        observed_calls: call indices at which candidate errors were measured.
        data_range: width of the result's value range for PSNR; null: `metrics.value_range` decides.
        source: how `load_workload` finds the workload again; null: it was made in Python.
        seeds: seeds that were asked for.
        finished: those that have been recorded.
        costs: measured times; null until all seeds are recorded.
        weight_bytes: of all the model's parameters and buffers.
        residual_bytes: of one stored residual of the block stack, all guidance branches together.
        notes: what was left out, and why.
    """

    ditopt_profile: Literal[2] = 2
    model: ModelRecord
    sampler: Sampler
    hardware: Hardware
    layout: TokenLayout | None
    block: Block
    options: tuple[AttentionOption, ...]
    orders: tuple[TokenOrder | None, ...] = (None,)
    selectors: tuple[SelectorOption, ...] = ()
    arithmetics: tuple[Arithmetic, ...] = ()
    shapes: dict[str, SiteShape]
    observed_calls: tuple[int, ...]
    data_range: float | None
    source: str | None = None
    seeds: tuple[int, ...]
    finished: tuple[int, ...] = ()
    costs: Costs | None = None
    weight_bytes: int = Field(0, ge=0)
    residual_bytes: int = Field(0, ge=0)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _orders_exist(self) -> Self:
        if self.orders[:1] != (None,):
            raise ValueError("orders: the first must be null, the model's own order")
        if any(option.order >= len(self.orders) for option in self.options):
            raise ValueError(f"options: an order is not one of the {len(self.orders)} in `orders`")
        return self

    @property
    def complete(self) -> bool:
        """Whether every seed and the costs are there."""
        return self.costs is not None and set(self.seeds) <= set(self.finished)

    def kept(self, shape: SiteShape) -> tuple[float, ...]:
        """[C] fraction of the blocks that each option keeps at a site."""
        sizes = (shape.tokens, shape.tokens, self.block.q, self.block.k)
        return tuple(
            density(option.pattern, self.layout, *sizes, self.orders[option.order])
            for option in self.options
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read profile.json; it may still be incomplete.

        Raises:
            ProfileError: malformed, or of another version.
            FileError: there is none.
        """
        text = files.read_text(Path(folder) / PROFILE_NAME)
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ProfileError(
                f"{PROFILE_NAME}: {field}: {first['msg']}", remedy="Profile into a new folder."
            ) from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write profile.json atomically."""
        files.write_json(Path(folder) / PROFILE_NAME, self.model_dump(mode="json"))


class SeedRecord(BaseModel):
    """Tensors of one seed, float64 on the CPU; T calls per branch, O observed calls.

    Attributes:
        squared_error: per site [O, H, C], summed over batch, tokens, channels and branches.
        squared_norm: per site [O, H], of the dense output.
        gram: [T, T] inner products of the stack's residuals, summed over outputs and branches.
        hidden_energy: [T] squared norm of the stack's outputs, summed likewise.
        step_energy: [T] mean squared change of the sampled tensor that call t leads to.
        selector_error: per site [O, H, S] squared error of each of the profile's selectors.
        arithmetic_error: per site [O, H, A] squared error of each of the profile's arithmetics.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)

    squared_error: dict[str, Tensor]
    squared_norm: dict[str, Tensor]
    gram: Tensor
    hidden_energy: Tensor
    step_energy: Tensor
    selector_error: dict[str, Tensor] = Field(default_factory=dict)
    arithmetic_error: dict[str, Tensor] = Field(default_factory=dict)

    def save(self, folder: Path, seed: int) -> None:
        """Write `seed_<n>.safetensors` atomically."""
        tensors = {name: getattr(self, name) for name in ("gram", "hidden_energy", "step_energy")}
        for site in self.squared_error:
            tensors[f"squared_error/{site}"] = self.squared_error[site]
            tensors[f"squared_norm/{site}"] = self.squared_norm[site]
        for site, error in self.selector_error.items():
            tensors[f"selector_error/{site}"] = error
        for site, error in self.arithmetic_error.items():
            tensors[f"arithmetic_error/{site}"] = error
        with files.atomic_path(seed_path(folder, seed)) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors))

    @classmethod
    def load(cls, folder: Path, seed: int, profile: Profile) -> SeedRecord:
        """Read and check one seed's tensors.

        Raises:
            ProfileError: missing, truncated, not finite, or of other sizes than the profile says.
        """
        path = seed_path(folder, seed)
        try:
            tensors = safetensors.torch.load(path.read_bytes())
            record = cls(
                squared_error={s: tensors[f"squared_error/{s}"] for s in profile.shapes},
                squared_norm={s: tensors[f"squared_norm/{s}"] for s in profile.shapes},
                selector_error={
                    s: tensors[f"selector_error/{s}"] for s in profile.shapes if profile.selectors
                },
                arithmetic_error={
                    s: tensors[f"arithmetic_error/{s}"]
                    for s in profile.shapes
                    if profile.arithmetics
                },
                **{name: tensors[name] for name in ("gram", "hidden_energy", "step_energy")},
            )
        except (OSError, SafetensorError, KeyError) as error:
            raise ProfileError(
                f"{path.name} is missing or damaged: {error}",
                remedy=f"Delete {path.name} and profile again; the other seeds are kept.",
            ) from error
        record._check(path.name, profile)
        return record

    def _check(self, name: str, profile: Profile) -> None:
        calls, observed = profile.sampler.calls, len(profile.observed_calls)
        expected: dict[str, tuple[tuple[int, ...], Tensor]] = {
            "gram": ((calls, calls), self.gram),
            "hidden_energy": ((calls,), self.hidden_energy),
            "step_energy": ((calls,), self.step_energy),
        }
        for site, shape in profile.shapes.items():
            heads, choices = shape.heads, len(profile.options)
            expected[f"squared_error/{site}"] = (
                (observed, heads, choices),
                self.squared_error[site],
            )
            expected[f"squared_norm/{site}"] = ((observed, heads), self.squared_norm[site])
            if profile.selectors:
                expected[f"selector_error/{site}"] = (
                    (observed, heads, len(profile.selectors)),
                    self.selector_error[site],
                )
            if profile.arithmetics:
                expected[f"arithmetic_error/{site}"] = (
                    (observed, heads, len(profile.arithmetics)),
                    self.arithmetic_error[site],
                )
        for field, (sizes, tensor) in expected.items():
            if tuple(tensor.shape) != sizes or not bool(torch.isfinite(tensor).all()):
                raise ProfileError(
                    f"{name}: {field}: expected finite values of shape {sizes}, "
                    f"got shape {tuple(tensor.shape)}",
                    remedy=f"Delete {name} and profile again; the other seeds are kept.",
                )


def has_seed(folder: Path, seed: int) -> bool:
    """Whether a seed's file is there; it is renamed into place only when it is whole."""
    return seed_path(folder, seed).is_file()


def load_complete(folder: str | os.PathLike[str]) -> tuple[Profile, list[SeedRecord]]:
    """A finished profile with the tensors of its seeds.

    Raises:
        ProfileError: no profile, half a profile, or a damaged file, with what to do about it.
    """
    path = Path(folder)
    try:
        profile = Profile.load(path)
    except FileError as error:
        raise ProfileError(
            f"{str(path)!r} holds no profile", remedy="Run `ditopt profile` into this folder first."
        ) from error
    if not profile.complete:
        raise ProfileError(
            f"{str(path)!r} is half written: {len(profile.finished)} of {len(profile.seeds)} seeds "
            f"are recorded, costs are {'not ' if profile.costs is None else ''}measured",
            remedy="Run the same `ditopt profile` again; it resumes.",
        )
    return profile, [SeedRecord.load(path, seed, profile) for seed in profile.seeds]


def seed_path(folder: Path, seed: int) -> Path:
    """Where a seed's tensors are."""
    return folder / f"seed_{seed}.safetensors"

"""What a plan belongs to, was asked for and has shown: types, units and checks of single parts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ditopt.errors import PlanError
from ditopt.plan.fields import Count, FileName, Float, Index, Part, PositiveFloat, Sha256, Text


class SiteRecord(Part):
    """An attention site of the profiled model.

    Attributes:
        id: stable id, module path and ordinal (`blocks.3.attn1#0`).
        kind: self, cross or joint (image and text in one sequence).
        heads: query heads.
        head_dim: size D of one head.
    """

    id: Text
    kind: Literal["self", "cross", "joint"]
    heads: Count
    head_dim: Count


class LinearRecord(Part):
    """A linear layer of the profiled model; `id` is its module path."""

    id: Text
    in_features: Count
    out_features: Count


class ModelRecord(Part):
    """The model a plan belongs to.

    Attributes:
        architecture: sha256 over parameter names, shapes and dtypes.
        weights: sha256 over the values.
        name: the model's class, for people.
        sites: every attention site in execution order.
        linears: the linear layers that rules may name, in execution order.
    """

    architecture: Sha256
    weights: Sha256
    name: Text
    sites: tuple[SiteRecord, ...]
    linears: tuple[LinearRecord, ...] = ()


class Sampler(Part):
    """The denoising loop, as seen from the model's calls.

    Attributes:
        calls: calls of the model in one loop, per guidance branch.
        branches: guidance branches that call the model separately; 1 where they are one batch.
        timestep: name of the model input that carries the timestep, or null.
        timesteps: its value at each call; empty without such an input.
        varying: names of the inputs that change from call to call, the timestep among them.
    """

    calls: Count
    branches: Count = 1
    timestep: Text | None = None
    timesteps: tuple[Float, ...] = ()
    varying: tuple[Text, ...] = ()


class Hardware(Part):
    """Where the costs were measured."""

    device: Text
    name: Text
    torch: Text
    threads: Count


class Goal(Part):
    """What was asked for: everything that is stated, and at least one thing.

    With a quality, the fastest plan that keeps it; else the plan of best quality within the rest.

    Attributes:
        min_psnr_db: mean over seeds of the PSNR against the dense result, in dB.
        min_ssim: mean over seeds of the SSIM against the dense result.
        target_speedup: time of one dense sampling loop over the plan's.
        max_memory_bytes: of weights and stored residuals.
    """

    min_psnr_db: PositiveFloat | None = None
    min_ssim: Annotated[Float, Field(gt=0, lt=1)] | None = None
    target_speedup: Annotated[Float, Field(gt=1)] | None = None
    max_memory_bytes: Annotated[int, Field(ge=1, le=1 << 50)] | None = None

    def model_post_init(self, context: object) -> None:
        """Refuse no goal."""
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise PlanError(f"goal: expected at least one of {', '.join(type(self).model_fields)}")

    def __str__(self) -> str:
        parts = {
            "PSNR >= {:g} dB": self.min_psnr_db,
            "SSIM >= {:g}": self.min_ssim,
            "speedup >= {:g}x": self.target_speedup,
            "memory <= {:.4g} MiB": self.max_memory_bytes and self.max_memory_bytes / 2**20,
        }
        return " and ".join(text.format(value) for text, value in parts.items() if value)


class Predicted(Part):
    """What the search expects of one sampling loop, from the profile.

    Attributes:
        seconds: time of the loop.
        speedup: dense time over it.
        psnr_db: PSNR against the dense result; null for a plan without any approximation.
        ssim: SSIM likewise.
        bytes: weights in their formats and stored residuals.
        density: kept fraction of attention blocks in the last phase, mean over heads and sites.
    """

    seconds: PositiveFloat
    speedup: PositiveFloat
    psnr_db: Float | None
    ssim: Float | None = None
    bytes: Annotated[int, Field(ge=0)] | None = None
    density: Annotated[Float, Field(ge=0, le=1)]


class Verification(Part):
    """One measurement by full sampling.

    Attributes:
        purpose: `tune` (the search looked at it) or `audit` (fresh seeds; the only quality claim).
        seeds: the seeds that were sampled.
        psnr_db: PSNR against dense for each seed.
        mean_psnr_db: their mean, which a PSNR goal is about.
        min_psnr_db: the worst seed.
        p10_psnr_db: the tenth percentile over seeds.
        mean_ssim: mean over seeds of the SSIM, which an SSIM goal is about.
        speedup: dense time over the plan's time; null where it was not measured.
        margin_db: how far above the goal the search aimed.
        passed: whether the goal was met.
        adopted: whether it is about this very plan, not about one tried before it.
    """

    purpose: Literal["tune", "audit"]
    seeds: Annotated[tuple[Index, ...], Field(min_length=1)]
    psnr_db: Annotated[tuple[Float, ...], Field(min_length=1)]
    mean_psnr_db: Float
    min_psnr_db: Float
    p10_psnr_db: Float
    mean_ssim: Float | None = None
    speedup: PositiveFloat | None = None
    margin_db: Float = 0.0
    passed: bool
    adopted: bool


class SideFile(Part):
    """A safetensors file beside the plan."""

    name: FileName
    sha256: Sha256

"""A made-up profile of any size: heads of known difficulty, residuals that drift smoothly."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from ditopt.layout import TokenLayout
from ditopt.patterns import block_mask, candidates
from ditopt.plan import Block, Hardware, ModelRecord, Sampler, SiteRecord
from ditopt.profiling.linears import LinearCost, LinearGroup, LinearProfile
from ditopt.profiling.schema import (
    AttentionCost,
    AttentionOption,
    Costs,
    Profile,
    SeedRecord,
    SiteShape,
)
from ditopt.quantization import LinearRule

CALLS = 12
LAYOUT = TokenLayout(4, 8, 8)
SIZES = (LAYOUT.tokens, LAYOUT.tokens, 16, 16)
PATTERNS = candidates(LAYOUT, LAYOUT.tokens, 16, 16)
KEPT = torch.stack([block_mask(p, LAYOUT, *SIZES) for p in PATTERNS]).double().mean((1, 2))
RULES = (LinearRule(format="int8_row"), LinearRule(format="int8_row", transform="balance"))


def make_profile(
    folder: Path,
    *,
    layers: int = 3,
    heads: int = 3,
    options: tuple[AttentionOption, ...] | None = None,
    roughness: float = 0.02,
    seeds: int = 2,
    calls: int = CALLS,
    means: bool = False,
) -> Profile:
    """Some heads local, some diffuse; later layers are harder.

    With `means`, options come a second time with block means, at a tenth of the error.
    """
    if options is None:
        options = tuple(AttentionOption(pattern=p) for p in PATTERNS)
        if means:
            more = (AttentionOption(pattern=p, remainder="mean") for p in PATTERNS[1:])
            options = (*options, *more)
    shape = SiteShape(batch=2, heads=heads, tokens=LAYOUT.tokens, head_dim=16, dtype="float32")
    ids = [f"blocks.{layer}.attn1#0" for layer in range(layers)]
    table = tuple((density, 2.0 + 18.0 * density) for density in (1.0, 0.5, 0.25))
    profile = Profile(
        model=ModelRecord(
            architecture="a" * 64,
            weights="b" * 64,
            name="Toy",
            sites=tuple(SiteRecord(id=i, kind="self", heads=heads, head_dim=16) for i in ids),
        ),
        sampler=Sampler(calls=calls),
        hardware=Hardware(device="cpu", name="a CPU", torch="2.13.0", threads=2),
        layout=LAYOUT,
        block=Block(q=16, k=16),
        options=options,
        shapes=dict.fromkeys(ids, shape),
        observed_calls=(0, calls // 2, calls - 1),
        data_range=2.0,
        seeds=tuple(range(seeds)),
        finished=tuple(range(seeds)),
        weight_bytes=1 << 20,
        residual_bytes=1 << 12,
        costs=Costs(
            dense_call_ms=25.0 * layers,
            skip_call_ms=2.5 * layers,
            attention=(
                AttentionCost(
                    shape=shape, dense_ms=15.0, sparse_ms=table, mean_ms=table if means else ()
                ),
            ),
        ),
    )
    folder.mkdir(exist_ok=True, parents=True)
    profile.save(folder)
    kept = torch.tensor(profile.kept(shape), dtype=torch.float64)
    share = torch.tensor([0.1 if o.remainder == "mean" else 1.0 for o in options]).double()
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        errors, norms = {}, {}
        for layer, site in enumerate(ids):
            difficulty = torch.logspace(-5, -2.5, heads).double() * (1 + layer % 7)
            errors[site] = (difficulty[:, None] * (1 - kept) ** 2 * share).repeat(3, 1, 1)
            norms[site] = torch.ones(3, heads, dtype=torch.float64)
        time = torch.linspace(0, 1, calls, dtype=torch.float64)[:, None]
        basis = torch.randn(3, 64, generator=generator, dtype=torch.float64)
        noise = torch.randn(calls, 64, generator=generator, dtype=torch.float64)
        residuals = basis[0] + time * basis[1] + time**2 * basis[2] + roughness * noise
        SeedRecord(
            squared_error=errors,
            squared_norm=norms,
            gram=residuals @ residuals.T,
            hidden_energy=2 * residuals.square().sum(1),
            step_energy=torch.full((calls,), 0.01, dtype=torch.float64),
        ).save(folder, seed)
    return profile


def make_linears(layers: int = 3, width: int = 64) -> LinearProfile:
    """Two groups in each block; int8 takes half the time, and early layers lose more by it."""
    sizes = {"attn1.to_q": (width, width), "ff.up": (width, 4 * width)}
    groups = tuple(
        LinearGroup(
            members=(f"blocks.{layer}.{name}",),
            rows=LAYOUT.tokens,
            in_features=k,
            out_features=(n,),
            error=((4e-5 / (1 + layer),) * 2, (1e-5 / (1 + layer),) * 2),
            direction_error=((2e-5 / (1 + layer),) * 2, (5e-6 / (1 + layer),) * 2),
            outliers={},
            range_amax=(1.0, 1.0),
        )
        for layer in range(layers)
        for name, (k, n) in sizes.items()
    )
    shapes = sorted({group.shape for group in groups})
    return LinearProfile(
        weights="b" * 64,
        rules=RULES,
        ranges=((0, CALLS // 2), (CALLS // 2, CALLS)),
        groups=groups,
        costs=tuple(
            LinearCost(shape=shape, plain_ms=2.0, format_ms={"int8_row": 1.0}) for shape in shapes
        ),
    )


def save_linears(folder: Path, layers: int = 3) -> None:
    """`make_linears` as files beside a profile."""
    profile = make_linears(layers)
    (folder / "linears.json").write_text(profile.model_dump_json())
    tensors = {
        f"linear/{name}/{member}": torch.ones(group.in_features)
        for group in profile.groups
        for member in group.members
        for name in ("amax", "mean")
    }
    safetensors.torch.save_file(tensors, folder / "linears.safetensors")

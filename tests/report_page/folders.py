"""A small profile folder with a plan, written through the classes that the real ones write."""

import hashlib
import math

import safetensors.torch
import torch

from ditopt.layout import TokenLayout
from ditopt.patterns import (
    Band,
    Circle,
    Dense,
    MultiDiagonal,
    PooledTopK,
    Skip,
    Stripe,
    Window,
    block_mask,
)
from ditopt.plan import (
    Block,
    Cache,
    Goal,
    Hardware,
    LinearRecord,
    ModelRecord,
    Phase,
    Plan,
    Predicted,
    Sampler,
    SiteRecord,
    Verification,
)
from ditopt.profiling.analysis import Analysis, HeadAnalysis
from ditopt.profiling.map_record import MapRecord
from ditopt.profiling.maps import HeadMaps
from ditopt.profiling.schema import (
    AttentionCost,
    AttentionOption,
    Costs,
    Profile,
    SeedRecord,
    SiteShape,
)
from ditopt.quantization import LinearRule
from ditopt.search.record import FrontierPoint, SearchRecord, Trial
from ditopt.token_order import Tile

CALLS, OBSERVED = 12, (3, 6, 10)
LAYOUT = TokenLayout(frames=4, height=8, width=8)
BLOCK = Block(q=16, k=16)
PATTERNS = (
    Dense(),
    Skip(),
    Band(window=20),
    Window(frames=2, rows=3, cols=3),
    MultiDiagonal(period="frame", width=4),
    Stripe(unit="frame", every=8),
    Circle(radius=3),
)
WORKLOAD = """
import torch
from ditopt import Workload

def frames(result):
    return ((result + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()

def workload():
    return Workload(torch.nn.Identity().eval(), lambda model, seed: None, frames=frames, name="toy")
"""


def model(layers=3, heads=4, name="ToyDiT", blocks="blocks"):
    sites = [
        SiteRecord(id=f"{blocks}.{n}.{kind}#0", kind=kind_of, heads=heads, head_dim=16)
        for n in range(layers)
        for kind, kind_of in (("attn1", "self"), ("attn2", "cross"))
    ]
    linears = [
        LinearRecord(id=f"{blocks}.{n}.{role}", in_features=64, out_features=64)
        for n in range(layers)
        for role in ("attn1.to_q", "attn1.to_k", "ff.up", "ff.down")
    ]
    sha256s = {"architecture": "a" * 64, "weights": "b" * 64}
    return ModelRecord(**sha256s, name=name, sites=tuple(sites), linears=tuple(linears))


def write_profile(
    folder,
    layers=3,
    heads=4,
    name="ToyDiT",
    blocks="blocks",
    hardware="Test CPU",
    notes=(),
    source=None,
    maps=True,
):
    """A finished profile of one seed; returns it."""
    record = model(layers, heads, name, blocks)
    tokens = LAYOUT.tokens
    shape = SiteShape(batch=1, heads=heads, tokens=tokens, head_dim=16, dtype="float32")
    cost = AttentionCost(shape=shape, dense_ms=4.0, sparse_ms=((0.1, 0.8), (1.0, 5.0)))
    options = tuple(
        AttentionOption(pattern=pattern, remainder=remainder)
        for remainder in ("drop", "mean")
        for pattern in PATTERNS
        if remainder == "drop" or pattern.kind != "dense"
    )
    profile = Profile(
        model=record.model_copy(update={"linears": ()}),
        sampler=Sampler(
            calls=CALLS,
            timestep="timestep",
            timesteps=tuple(1000.0 - 80 * n for n in range(CALLS)),
            varying=("hidden_states", "timestep"),
        ),
        hardware=Hardware(device="cpu", name=hardware, torch="2.13.0", threads=2),
        layout=LAYOUT,
        block=BLOCK,
        options=options,
        shapes={site.id: shape for site in record.sites if site.kind == "self"},
        observed_calls=OBSERVED,
        data_range=2.0,
        source=source,
        seeds=(0,),
        finished=(0,),
        costs=Costs(
            dense_call_ms=40.0,
            skip_call_ms=2.0,
            attention=(cost,),
        ),
        notes=tuple(notes),
    )
    folder.mkdir(parents=True, exist_ok=True)
    profile.save(folder)
    _write_seed(folder, profile)
    if maps:
        _write_maps(folder, profile)
    return profile


def _write_seed(folder, profile):
    generator = torch.Generator().manual_seed(0)
    observed, count = len(OBSERVED), len(profile.options)
    errors, norms = {}, {}
    for site, shape in profile.shapes.items():
        norms[site] = torch.ones(observed, shape.heads, dtype=torch.float64)
        drawn = torch.rand(observed, shape.heads, count, generator=generator, dtype=torch.float64)
        errors[site] = drawn.square() * 0.02
        errors[site][..., 0] = 0.0
    ones = torch.ones(CALLS, dtype=torch.float64)
    SeedRecord(
        squared_error=errors,
        squared_norm=norms,
        gram=torch.eye(CALLS, dtype=torch.float64),
        hidden_energy=ones,
        step_energy=ones.clone(),
    ).save(folder, 0)


def _write_maps(folder, profile):
    """Maps that look like the patterns: mass where a head's own pattern keeps blocks."""
    sizes = (LAYOUT.tokens, LAYOUT.tokens, BLOCK.q, BLOCK.k)
    masks = torch.stack(
        [block_mask(option.pattern, LAYOUT, *sizes) for option in profile.options]
    ).double()
    fields = {name: {} for name in ("mass", "recall", "top", "rank", "kept", "clusters")}
    for row, (site, shape) in enumerate(profile.shapes.items()):
        per_call = []
        for call in range(len(OBSERVED)):
            generator = torch.Generator().manual_seed(100 * row + call)
            noise = torch.rand(shape.heads, *masks.shape[1:], generator=generator).double()
            heads = [2 + (row + head) % (len(PATTERNS) - 2) for head in range(shape.heads)]
            own = masks[heads]
            mass = own * (0.5 + noise) + 0.02 * noise
            per_call.append(mass / mass.sum(-1, keepdim=True))
        found = [HeadMaps.of(mass) for mass in per_call]
        for name in ("mass", "recall", "top", "rank"):
            fields[name][site] = torch.stack([getattr(maps, name) for maps in found])
        mass = torch.stack(per_call)
        kept = torch.einsum("ohqk,cqk->ohc", mass, masks) / mass.shape[2]
        fields["kept"][site] = kept.float()
        fields["clusters"][site] = torch.full((shape.heads, 5), 0.5)
    MapRecord(**fields).save(folder, 0)


def make_plan(profile, goal_db=30.0, order=None, assumptions=("calls 0 to 3 stay dense",)):
    """Two phases, a cache and formats; heads take the patterns in turn."""
    sites = list(profile.shapes)
    heads = profile.shapes[sites[0]].heads
    attention = {
        site: tuple(PATTERNS[1 + (row + h) % (len(PATTERNS) - 1)] for h in range(heads))
        for row, site in enumerate(sites[:-1])
    }
    full = (0, 1, 2, 3, 6, 9)
    coefficients = {
        call: (1.6, -0.6) if call > 3 else (1.0,) for call in range(CALLS) if call not in full
    }
    blocks = sites[0].partition(".0.")[0]
    record = model(len(sites), heads, profile.model.name, blocks)
    rules = {
        f"{blocks}.{n}.{role}": LinearRule(format="int8_row", transform=transform)
        for n in range(len(sites))
        for role, transform in (("ff.up", "none"), ("ff.down", "balance"))
    }
    phases = (
        Phase(calls=(0, 4)),
        Phase(
            calls=(4, CALLS),
            attention=attention,
            selectors={sites[-1]: PooledTopK(density=0.25)},
            linear=rules,
        ),
    )
    checks = (
        ("tune", (1000, 1001), (28.4, 28.9), False, False),
        ("tune", (1000, 1001), (31.2, 30.6), True, True),
        ("audit", (2000, 2001, 2002), (31.5, 30.2, 30.9), True, True),
    )
    return Plan(
        model=record,
        sampler=profile.sampler,
        hardware=profile.hardware,
        goal=Goal(min_psnr_db=goal_db),
        layout=profile.layout,
        block=profile.block,
        order=order,
        phases=phases,
        cache=Cache(full=full, history=2, coefficients=coefficients),
        predicted=Predicted(seconds=0.2, speedup=2.4, psnr_db=31.0, density=0.31),
        verification=tuple(
            Verification(
                purpose=purpose,
                seeds=seeds,
                psnr_db=values,
                mean_psnr_db=sum(values) / len(values),
                min_psnr_db=min(values),
                p10_psnr_db=min(values),
                margin_db=0.3,
                passed=passed,
                adopted=adopted,
            )
            for purpose, seeds, values, passed, adopted in checks
        ),
        assumptions=tuple(assumptions),
    )


def write_results(folder, seed=2000, size=(8, 48, 64), noise=0.06):
    """A dense and an optimized clip fp32 [F, 3, H, W] that differ a little."""
    count, height, width = size
    rows = torch.linspace(-1, 1, height)[:, None]
    columns = torch.linspace(-1, 1, width)
    channels = [
        torch.broadcast_tensors(rows * columns, rows, columns * math.cos(n)) for n in range(count)
    ]
    clip = torch.stack([torch.stack(frame) for frame in channels])
    drawn = torch.rand(clip.shape, generator=torch.Generator().manual_seed(0)) * noise
    for kind, result in (("dense", clip), ("optimized", (clip + drawn).clamp(-1, 1))):
        data = safetensors.torch.save({"result": result.contiguous()})
        (folder / f"{kind}_{seed}.safetensors").write_bytes(data)


SHIFTED = Tile(frames=4, rows=2, cols=2)


def write_search(folder, plan_path):
    """What the search records: trials and the frontier."""
    frontier = tuple(
        FrontierPoint(
            predicted_speedup=1.2 + 0.3 * n,
            predicted_psnr_db=46.0 - 3.5 * n,
            full_calls=11 - n,
            density=0.9 - 0.1 * n,
        )
        for n in range(7)
    )
    trials = tuple(
        Trial(
            purpose=purpose,
            seeds=seeds,
            predicted_psnr_db=predicted,
            measured_psnr_db=measured,
            predicted_seconds=0.48 / speedup,
            predicted_speedup=speedup,
            measured_seconds=0.5 / speedup,
            full_calls=6,
            density=0.31,
            adopted=speedup == 2.4,
        )
        for purpose, seeds, predicted, measured, speedup in (
            ("tune", (1000, 1001), None, (28.4, 28.9), 2.9),
            ("tune", (1000, 1001), 30.4, (28.4, 28.9), 2.7),
            ("tune", (1000, 1001), 31.0, (31.2, 30.6), 2.4),
            ("audit", (2000, 2001, 2002), 31.0, (31.5, 30.2, 30.9), 2.4),
        )
    )
    sha256 = hashlib.sha256(plan_path.read_bytes()).hexdigest()
    SearchRecord(goal="PSNR >= 30 dB", trials=trials, frontier=frontier, plan_sha256=sha256).save(
        folder
    )


def write_analysis(folder, profile):
    """Class and stability of every head."""
    kinds = (("window", "spatial"), ("multi_diagonal", "temporal"), ("stripe", "stripe"))
    verdicts = ("static", "refresh", "dense")
    sites = {
        site: tuple(
            HeadAnalysis(
                kind=kinds[(row + h) % 3][0],
                structure=kinds[(row + h) % 3][1],
                margin=0.1 + 0.2 * h,
                option=3,
                density_at_recall_90=0.1 + 0.05 * h,
                jaccard_seeds=None,
                jaccard_steps=0.8 - 0.15 * h,
                rank_seeds=None,
                rank_steps=0.9,
                verdict=verdicts[h % 3],
                effective_rank=3.0 + h,
            )
            for h in range(shape.heads)
        )
        for row, (site, shape) in enumerate(profile.shapes.items())
    }
    Analysis(seeds=profile.seeds, sites=sites).save(folder)


def write_everything(folder, **options):
    """Profile, analysis, plan, search and results; returns the plan's path."""
    folder.mkdir(parents=True, exist_ok=True)
    source = (folder.parent / "workload.py").resolve()
    source.write_text(WORKLOAD)
    profile = write_profile(folder, source=f"{source}:workload", **options)
    write_analysis(folder, profile)
    plan_path = folder.parent / "plan.yaml"
    make_plan(profile).save(plan_path)
    write_search(folder, plan_path)
    write_results(folder)
    return plan_path

"""Recording, resuming and refusing: the profile directory after every way that a run can end.

A toy denoiser whose attention is shown to the observer by hand stands for the captured graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.calls import record_calls
from ditopt.errors import FileError, ProfileError, WorkloadError
from ditopt.layout import TokenLayout
from ditopt.patterns import Dense, Skip
from ditopt.profiling import Profile, ProfileSpec, SeedRecord, load_complete
from ditopt.profiling.latents import StepEnergy
from ditopt.profiling.observer import ProfileObserver
from ditopt.profiling.run import profile
from ditopt.profiling.schema import AttentionCost, AttentionOption, Costs
from ditopt.progress import Progress
from ditopt.workload import Workload

LAYOUT = TokenLayout(4, 4, 4)
CALLS = 8
HEADS = 2


@dataclass(frozen=True)
class Site:
    id: str
    kind: str = "self"
    heads: int = HEADS
    head_dim: int = 8
    mask: str = "none"


SITES = (Site("blocks.0.attn1#0"), Site("blocks.0.attn2#0", "cross"), Site("blocks.1.attn1#0"))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(16, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.out(hidden_states) * (1 + timestep.view(-1, 1, 1) / 1000)


def observe(model: nn.Module, observer: ProfileObserver) -> Callable[..., Any]:
    assert isinstance(model, Toy)

    def run(hidden_states: Tensor, timestep: Tensor) -> Tensor:
        q = model.q(hidden_states).unflatten(-1, (HEADS, 8)).transpose(1, 2)
        for site in SITES:
            keys = q[:, :, :6] if site.kind == "cross" else q
            observer.attention(site, q, keys, keys, 0.5, None)
        output = model(hidden_states, timestep)
        observer.stack((hidden_states,), (hidden_states + output,))
        return output

    return run


def sample(model: Callable[..., Tensor], seed: int, calls: int = CALLS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(1, LAYOUT.tokens, 16, generator=generator)
    for step in range(calls):
        time = torch.full((1,), 1000.0 * (1 - step / calls))
        state = state - model(hidden_states=state, timestep=time) / calls
    return state


def toy_workload(**changes: Any) -> Workload:
    values = {"model": Toy().eval(), "sample": sample, "layout": LAYOUT, "data_range": 2.0}
    return Workload(**{**values, **changes})


def toy_costs(workload: Workload, profile: Profile, progress: Progress) -> Costs:
    """Dense attention is half of a 100 ms call; the sparse executor is linear in density."""
    shape = next(iter(profile.shapes.values()))
    table = tuple((density, 2.0 + 30.0 * density) for density in (1.0, 0.5, 0.1))
    attention = (AttentionCost(shape=shape, dense_ms=25.0, sparse_ms=table),)
    return Costs(dense_call_ms=100.0, skip_call_ms=10.0, attention=attention)


SPEC = ProfileSpec(observed_calls=3, block={"q": 8, "k": 8})


def run(out: Path, workload: Workload | None = None, **changes: Any) -> Profile:
    options: dict[str, Any] = {"seeds": 2, "spec": SPEC, "observe": observe} | changes
    return profile(workload or toy_workload(), out, measure=toy_costs, **options)


def test_a_profile_describes_the_loop_and_its_sites(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done == Profile.load(tmp_path)
    assert done.complete
    assert done.seeds == done.finished == (0, 1)
    assert done.sampler.calls == CALLS
    assert done.sampler.timestep == "timestep"
    assert done.observed_calls == (0, 4, 7)
    assert [site.id for site in done.model.sites] == [site.id for site in SITES]
    assert list(done.shapes) == ["blocks.0.attn1#0", "blocks.1.attn1#0"]
    assert done.notes == (
        "blocks.0.attn2#0: dense attention, queries and keys are different sequences",
        "8-bit attention is not offered: the 8-bit kernel is for compute capability 9.0, "
        "the device is cpu",
    )
    assert done.arithmetics == ("int8_qk", "int8_qk_e4m3_pv")
    assert done.options[0].pattern == Dense()
    assert done.options.count(AttentionOption(pattern=Skip())) == 1
    assert done.orders[0] is None
    assert {option.order for option in done.options} == set(range(len(done.orders)))
    assert {option.remainder for option in done.options} == {"drop", "mean"}
    assert len(set(done.options)) == len(done.options) <= 64


def test_tensors_hold_errors_and_residuals(tmp_path: Path) -> None:
    run(tmp_path)
    done, (first, second) = load_complete(tmp_path)
    for site in done.shapes:
        assert first.squared_error[site].shape == (3, HEADS, len(done.options))
        assert (first.squared_error[site][..., 0] == 0).all()
        skip = done.options.index(AttentionOption(pattern=Skip()))
        torch.testing.assert_close(first.squared_error[site][..., skip], first.squared_norm[site])
        assert first.selector_error[site].shape == (3, HEADS, len(done.selectors))
        # Of one rule, more blocks err less; all of them less than no block at all.
        by_density = first.selector_error[site][..., :3]
        assert (by_density.diff(dim=-1) <= 0).all()
        assert (by_density < first.squared_norm[site][..., None]).all()
    assert not torch.equal(first.gram, second.gram)
    torch.testing.assert_close(first.gram, first.gram.T)
    assert torch.linalg.eigvalsh(first.gram).min() > -1e-6


def test_step_energy_is_the_solver_s_own_step(tmp_path: Path) -> None:
    run(tmp_path)
    _, (first, _) = load_complete(tmp_path)
    states = []

    def denoiser(hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        states.append(hidden_states)
        return model(hidden_states, timestep)

    workload = toy_workload()
    model = workload.models["model"]
    workload.run(0, {"model": denoiser})
    steps = [float((b - a).square().mean()) for a, b in pairwise(states)]
    assert first.step_energy.tolist() == pytest.approx([*steps, steps[-1]], rel=1e-5)


def test_memory_bounds_what_is_kept_of_residuals(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    tight = ProfileSpec(observed_calls=3, block={"q": 8, "k": 8}, memory_bytes=1 << 20)
    assert run(tmp_path / "tight", spec=tight).observed_calls == whole.observed_calls


def test_ctrl_c_keeps_finished_seeds_and_resumes(tmp_path: Path) -> None:
    seen: list[int] = []
    armed = [True]

    def interrupted(model: Any, seed: int) -> torch.Tensor:
        seen.append(seed)
        if seed == 1 and armed:
            armed.clear()
            raise KeyboardInterrupt
        return sample(model, seed)

    workload = toy_workload(sample=interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, workload)
    with pytest.raises(ProfileError, match=r"half written: 1 of 2 seeds"):
        load_complete(tmp_path)
    before = (tmp_path / "seed_0.safetensors").stat().st_mtime_ns
    seen.clear()
    assert run(tmp_path, workload).complete is True
    assert seen.count(0) == 1  # the plain loop; the seed itself is not sampled again
    assert (tmp_path / "seed_0.safetensors").stat().st_mtime_ns == before


def test_a_finished_profile_measures_nothing_again(tmp_path: Path) -> None:
    run(tmp_path)

    def never(*_: Any) -> Any:
        raise AssertionError

    again = profile(toy_workload(), tmp_path, seeds=2, spec=SPEC, observe=observe, measure=never)
    assert again.complete


def test_more_seeds_extend_a_profile(tmp_path: Path) -> None:
    run(tmp_path, seeds=1)
    assert run(tmp_path, seeds=3).finished == (0, 1, 2)


class Other(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


def test_the_profile_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "profile.json").read_bytes()
    for changes, options, field in (
        ({"model": Other().eval()}, {}, "model.architecture"),
        ({"layout": TokenLayout(2, 4, 8)}, {}, "layout"),
        ({"data_range": 1.0}, {}, "data_range"),
        ({"sample": lambda model, seed: sample(model, seed, calls=5)}, {}, "sampler"),
        ({}, {"spec": ProfileSpec(observed_calls=3)}, "block"),
    ):
        with pytest.raises(ProfileError, match=f"{field} differs"):
            run(tmp_path, toy_workload(**changes), **options)
    reweighted = Toy().eval()
    with torch.no_grad():
        reweighted.out.weight.add_(0.1)
    with pytest.raises(ProfileError, match=r"model\.weights differs"):
        run(tmp_path, toy_workload(model=reweighted))
    assert (tmp_path / "profile.json").read_bytes() == before


def test_nan_is_named_by_call_and_site(tmp_path: Path) -> None:
    def poisoned(model: nn.Module, observer: Any) -> Any:
        inner = observe(model, observer)

        def denoiser(hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            if float(timestep) == 500.0:
                hidden_states = hidden_states * torch.nan
            return inner(hidden_states, timestep)

        return denoiser

    with pytest.raises(ProfileError, match=r"NaN or infinity at call 4 in blocks\.0\.attn1#0"):
        run(tmp_path, observe=poisoned)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: Any) -> None:
    def full_disk(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(FileError, match="No space left on device"):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"seeds": 0}, "seeds: expected at least 1, got 0"),
        ({"model": {"a": Toy().eval(), "b": Toy().eval()}}, {}, "has 2 denoisers"),
        (
            {"sample": lambda model, seed: sample(model, seed, calls=8 - seed)},
            {},
            "seed 1 makes fewer than the 8 calls of seed 0",
        ),
        (
            {"sample": lambda model, seed: sample(model, seed, calls=8 + seed)},
            {},
            "seed 1 makes more than the 8 calls of seed 0",
        ),
    ],
)
def test_loops_that_cannot_be_profiled(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProfileError, match=message):
        run(tmp_path, toy_workload(**changes), **options)


def test_a_training_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="training mode"):
        run(tmp_path, toy_workload(model=Toy()))


@pytest.mark.parametrize("damage", ["missing", "truncated", "sizes", "nan"])
def test_damaged_tensors_are_named(tmp_path: Path, damage: str) -> None:
    done = run(tmp_path)
    path = tmp_path / "seed_1.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        record = SeedRecord.load(tmp_path, 1, done)
        gram = record.gram[:-1] if damage == "sizes" else record.gram * torch.nan
        record.model_copy(update={"gram": gram.contiguous()}).save(tmp_path, 1)
    with pytest.raises(ProfileError, match=r"seed_1\.safetensors"):
        load_complete(tmp_path)


def test_a_folder_without_profile_and_a_corrupt_one(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="holds no profile"):
        load_complete(tmp_path)
    (tmp_path / "profile.json").write_text('{"ditopt_profile": 1}')
    with pytest.raises(ProfileError, match=r"profile\.json: ditopt_profile: .*should be 2"):
        load_complete(tmp_path)


def test_without_a_latent_every_call_counts_alike() -> None:
    module = nn.Linear(2, 2)
    fixed = torch.ones(1, 2)
    trace = record_calls(module, lambda: [module(fixed) for _ in range(3)])
    assert StepEnergy(trace).finish().tolist() == [1.0, 1.0, 1.0]

"""The sampling verifier: whose model, which references, what PSNR. Compilation is stood in for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt import fingerprint
from ditopt.errors import ProfileError
from ditopt.plan import Block, Hardware, ModelRecord, Plan, Sampler
from ditopt.profiling.cost import LoopTimes, every_second_call
from ditopt.profiling.schema import Profile
from ditopt.search import verify
from ditopt.search.verify import EXACT_DB, SamplingVerifier
from ditopt.workload import Workload


class Scale(nn.Module):
    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@dataclass
class Case:
    workload: Workload
    profile: Profile
    sampled: list[int]

    @property
    def plan(self) -> Plan:
        return every_second_call(self.profile)


@pytest.fixture
def case() -> Case:
    model, sampled = Scale().eval(), []

    def sample(model: Any, seed: int) -> Tensor:
        sampled.append(seed)
        x = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed))
        return model(model(x))

    profile = Profile(
        model=ModelRecord(
            architecture=fingerprint.architecture(model),
            weights=fingerprint.weights(model),
            name="Scale",
            sites=(),
        ),
        sampler=Sampler(calls=2),
        hardware=Hardware(device="cpu", name="a CPU", torch="2", threads=1),
        layout=None,
        block=Block(),
        options=(),
        shapes={},
        observed_calls=(0,),
        data_range=2.0,
        seeds=(0,),
    )
    return Case(Workload(model, sample, data_range=2.0), profile, sampled)


@pytest.fixture
def off_by(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes compiled loops return the dense result plus a constant."""

    def install(error: float) -> None:
        def loops(workload: Workload, plan: Plan, seeds: list[int]) -> list[LoopTimes]:
            return [LoopTimes(workload.run(seed) + error, 10.0, 2.0, 1, 1) for seed in seeds]

        monkeypatch.setattr(verify, "timed_loops", loops)

    return install


def test_psnr_is_against_the_dense_result_of_the_same_seed(
    case: Case, off_by: Any, tmp_path: Path
) -> None:
    off_by(0.02)
    measured = SamplingVerifier(case.workload, case.profile, tmp_path)(case.plan, [1000, 1001])
    assert [m.psnr_db for m in measured] == [40.0, 40.0]  # 20 log10(2 / 0.02)
    assert measured[0].seconds == pytest.approx(0.012)


def test_equal_results_have_a_finite_number(case: Case, off_by: Any, tmp_path: Path) -> None:
    off_by(0.0)
    (measured,) = SamplingVerifier(case.workload, case.profile, tmp_path)(case.plan, [1000])
    assert measured.psnr_db == EXACT_DB


def test_dense_results_are_kept(case: Case, off_by: Any, tmp_path: Path) -> None:
    off_by(0.1)
    SamplingVerifier(case.workload, case.profile, tmp_path)(case.plan, [1000])
    assert case.sampled == [1000, 1000]
    SamplingVerifier(case.workload, case.profile, tmp_path)(case.plan, [1000])
    assert case.sampled == [1000, 1000, 1000]


def test_a_damaged_dense_result_is_named(case: Case, off_by: Any, tmp_path: Path) -> None:
    off_by(0.1)
    (tmp_path / "dense_1000.safetensors").write_bytes(b"half")
    with pytest.raises(ProfileError, match=r"dense_1000\.safetensors is damaged"):
        SamplingVerifier(case.workload, case.profile, tmp_path)(case.plan, [1000])


class Deeper(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(1, 1)


@pytest.mark.parametrize(("model", "field"), [(Scale(0.6), "weights"), (Deeper(), "architecture")])
def test_the_profile_of_another_model_is_refused(
    case: Case, tmp_path: Path, model: nn.Module, field: str
) -> None:
    other = Workload(model.eval(), case.workload.sample)
    with pytest.raises(ProfileError, match=f"of another model.*{field} differs"):
        SamplingVerifier(other, case.profile, tmp_path)

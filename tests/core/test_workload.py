import subprocess
import sys

import pytest
import torch
from torch import nn

from ditopt.errors import WorkloadError
from ditopt.runtime.session import current_session
from ditopt.workload import Workload, load_workload


class Denoiser(nn.Module):
    def forward(self, x, timestep):
        return x * timestep


def sample(model, seed):
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(seed))
    for step in range(3):
        x = x + model(x, torch.tensor(1.0 - step / 3))
    return x


def test_run_gives_the_loop_s_result_for_its_seed():
    workload = Workload(Denoiser().eval(), sample)
    assert torch.equal(workload.run(1), workload.run(1))
    assert not torch.equal(workload.run(1), workload.run(2))


def test_a_run_is_one_sampling_run_and_names_it_anew_each_time():
    seen = []

    def observed(model, seed):
        seen.append(current_session())
        return sample(model, seed)

    workload = Workload(Denoiser().eval(), observed)
    workload.run(1)
    workload.run(1)
    assert None not in seen
    assert seen[0].key != seen[1].key


def test_run_hands_the_replacement_to_the_loop():
    workload = Workload(Denoiser().eval(), sample)
    noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(workload.run(1, {"model": lambda x, timestep: 0 * x}), noise)


def test_several_denoisers_are_given_by_name():
    models = {"high": Denoiser().eval(), "low": Denoiser().eval()}

    def two_experts(given, seed):
        return given["low"](given["high"](torch.ones(1), torch.tensor(3.0)), torch.tensor(2.0))

    workload = Workload(models, two_experts)
    assert workload.run(0).item() == 6.0
    assert {name: trace.timesteps for name, trace in workload.trace().items()} == {
        "high": (3.0,),
        "low": (2.0,),
    }


def test_gradients_are_off_and_the_name_falls_back_to_the_class():
    model = nn.Linear(3, 3).eval()
    workload = Workload(model, lambda model, seed: model(torch.ones(3)))
    assert not workload.run(0).requires_grad
    assert workload.title == "Linear"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {}}, "empty mapping"),
        ({"model": lambda x: x}, "expected a torch.nn.Module for 'model', got function"),
        ({"sample": None}, "must be a function sample"),
        ({"data_range": 0.0}, "data_range must be positive, got 0.0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(WorkloadError, match=message):
        Workload(**{"model": Denoiser(), "sample": sample, **fields})


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(WorkloadError, match=r"'model' is in training mode.*model\.eval\(\)"):
        Workload(Denoiser().train(), sample).run(0)


@pytest.mark.parametrize(
    ("result", "message"),
    [(None, "returned NoneType; expected a torch.Tensor"), (torch.tensor([float("nan")]), "NaN")],
)
def test_a_result_that_is_no_finite_tensor_is_refused(result, message):
    with pytest.raises(WorkloadError, match=message):
        Workload(Denoiser().eval(), lambda model, seed: result).run(0)


FILE = """
import torch
from helper import Denoiser
from ditopt import Workload

def workload():
    return Workload(Denoiser().eval(), lambda model, seed: model(torch.ones(1)), name="from file")

def number():
    return 3

def breaks():
    raise RuntimeError("no weights")

def refused():
    return Workload(None, None)
"""
HELPER = """
from torch import nn

class Denoiser(nn.Module):
    def forward(self, x):
        return x + 1
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "mine.py").write_text(FILE)
    yield tmp_path / "mine.py"
    sys.modules.pop("helper", None)


@pytest.mark.parametrize("suffix", ["", ":", ":workload"])
def test_a_workload_is_loaded_from_a_file_with_siblings(file, suffix):
    workload = load_workload(f"{file}{suffix}")
    assert workload.title == "from file"
    assert workload.run(0).item() == 2.0
    assert workload.origin == f"{file}:workload"


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":workloads", r"has no function 'workloads'.*Did you mean 'workload'"),
        (":number", r"number\(\) returned int; expected a ditopt.Workload"),
        (":breaks", r"breaks\(\) failed: RuntimeError: no weights"),
        (":refused", r"Workload.model: expected a torch.nn.Module"),
    ],
)
def test_a_bad_function_is_named(file, suffix, message):
    with pytest.raises(WorkloadError, match=message):
        load_workload(f"{file}{suffix}")


def test_a_missing_file_a_broken_file_and_no_file_are_told_apart(tmp_path):
    with pytest.raises(WorkloadError, match=r"no such file: .*missing\.py"):
        load_workload(str(tmp_path / "missing.py"))
    (tmp_path / "broken.py").write_text("def workload(:\n")
    with pytest.raises(WorkloadError, match=r"broken\.py cannot be imported: SyntaxError"):
        load_workload(str(tmp_path / "broken.py"))
    with pytest.raises(WorkloadError, match="cannot read 'some-model' as a workload"):
        load_workload("some-model")
    with pytest.raises(WorkloadError, match=r"no model_index\.json"):
        load_workload(f"diffusers:{tmp_path}")


def test_workloads_need_no_optional_package():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['diffusers', 'triton', 'onnx']));"
        "import ditopt.workload"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

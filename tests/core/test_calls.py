import pytest
import torch
from torch import nn

from ditopt.calls import record_calls
from ditopt.errors import WorkloadError


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x, timestep, context, extra=None, **kwargs):
        return (self.proj(x) + context * timestep.reshape(-1, 1),)


MODEL = Denoiser().eval()


def loop(prompts, steps=4, guided_from=0, fail_at=None, **kwargs):
    """A sampling loop with sequential guidance: one call per step and prompt."""
    x = torch.ones(2, 4)
    for step in range(steps):
        timestep = torch.full((2,), 1000.0 - 100 * step)
        scale = float("nan") if step == fail_at else 1.0
        for number, prompt in enumerate(prompts):
            if number == 0 or step >= guided_from:
                x = MODEL(x, timestep * scale, prompt, **kwargs)[0]
    return x


def test_without_guidance_there_is_one_branch():
    prompt = torch.ones(1, 4)
    trace = record_calls(MODEL, lambda: loop([prompt], extra={"sizes": [prompt, 7]}))
    assert trace.branches == 1
    assert trace.calls_per_branch == 4
    assert trace.timestep == "timestep"
    assert trace.timesteps == (1000.0, 900.0, 800.0, 700.0)
    assert trace.varying == ("timestep", "x")
    assert trace.invariant == ("context", "extra.sizes.0", "extra.sizes.1")
    assert trace.shapes["extra.sizes.0"] == (1, 4)
    assert trace.calls[0].inputs["extra.sizes.1"].value == 7


def test_sequential_guidance_gives_two_branches():
    prompts = [torch.ones(1, 4), torch.zeros(1, 4)]
    trace = record_calls(MODEL, lambda: loop(prompts))
    assert [(call.branch, call.index) for call in trace.calls] == [
        *((0, 0), (1, 0), (0, 1), (1, 1)),
        *((0, 2), (1, 2), (0, 3), (1, 3)),
    ]
    assert trace.varying == ("timestep", "x")


def test_guidance_that_starts_later_keeps_its_branches_apart():
    prompts = [torch.ones(1, 4), torch.zeros(1, 4)]
    trace = record_calls(MODEL, lambda: loop(prompts, guided_from=2))
    assert [len(trace.branch_calls(branch)) for branch in (0, 1)] == [4, 2]
    assert len(trace.timesteps) == trace.calls_per_branch == 4


def test_views_made_anew_each_step_are_the_same_input():
    prompt = torch.ones(4)

    def run():
        for step in range(3):
            MODEL(torch.rand(2, 4), torch.full((2,), float(step)), prompt[None])

    assert "context" in record_calls(MODEL, run).invariant


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_buffer_updated_in_place_varies(mode):
    def run():
        with mode():
            x = torch.ones(2, 4)
            for step in range(3):
                x += 1
                MODEL(x, torch.full((2,), float(step)), torch.ones(1, 4))

    assert "x" in record_calls(MODEL, run).varying


def test_a_timestep_by_another_name_is_known_by_its_course():
    class Other(nn.Module):
        def forward(self, latents, noise, size):
            return latents * noise

    model, x, size = Other(), torch.ones(2, 3, 4), torch.tensor([8, 8])

    def run():
        for step in range(3):
            model(latents=x * step, noise=torch.tensor(1.0 - step / 3), size=size)

    trace = record_calls(model, run)
    assert trace.timestep == "noise"
    assert trace.invariant == ("size",)


def test_nan_names_the_call_and_the_timestep():
    with pytest.raises(WorkloadError, match=r"'net' returned NaN or infinity at call 2 \(timestep"):
        record_calls(MODEL, lambda: loop([torch.ones(1, 4)], fail_at=2), name="net")


def test_a_loop_that_enables_gradients_is_refused():
    def run():
        with torch.enable_grad():
            loop([torch.ones(1, 4)])

    with pytest.raises(WorkloadError, match="with gradients enabled"):
        record_calls(MODEL, run)


def test_a_loop_without_calls_is_refused_and_leaves_no_hooks():
    with pytest.raises(WorkloadError, match="never called 'model'"):
        record_calls(MODEL, lambda: None)
    assert not MODEL._forward_hooks
    assert not MODEL._forward_pre_hooks

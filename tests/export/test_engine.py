"""What an engine does when it is called, on graphs in the place of native programs."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.errors import DitoptWarning, EngineError
from ditopt.export.recording import record
from ditopt.export.verify import worst_error
from ditopt.workload import Workload

from .engines import in_memory


def arguments(workload: Workload) -> dict[str, Tensor]:
    return dict(record(workload, "model", seed=0)[0].kwargs)


def test_it_equals_the_model_on_every_call_of_the_loop(engine: Any, workload: Workload) -> None:
    with torch.no_grad():
        for call in record(workload, "model", seed=0):
            assert worst_error(engine(**call.kwargs), call.result) == 0.0


def test_positional_arguments_and_other_strides_are_the_same_call(
    engine: Any, workload: Workload
) -> None:
    given = arguments(workload)
    latent = given["hidden_states"]
    strided = latent.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert strided.stride() != latent.stride()
    with torch.no_grad():
        expected = engine(**given)
        result = engine(strided, given["timestep"], given["encoder_hidden_states"])
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hidden_states", lambda x: x[:, :, :6], r"float32\[1, 3, 8, 8\].*got float32\[1, 3, 6"),
        ("hidden_states", lambda x: x.double(), "got float64"),
        ("encoder_hidden_states", lambda x: x[:, :4], r"got float32\[1, 4, 8\]"),
        ("timestep", lambda x: 900.0, "expected a tensor"),
        ("timestep", lambda x: x.to("meta"), "it is on meta"),
        ("residuals", lambda x: torch.ones(1), "exported with None, got a tensor"),
    ],
)  # fmt: skip
def test_a_call_that_it_was_not_made_for_is_refused_by_name(
    engine: Any, workload: Workload, name: str, change: Any, message: str
) -> None:
    given: dict[str, Any] = arguments(workload)
    given[name] = change(given.get(name))
    with pytest.raises(EngineError, match=f"^{name}: .*{message}"):
        engine(**given)


def test_a_missing_and_an_unknown_argument_are_named(engine: Any, workload: Workload) -> None:
    given = arguments(workload)
    with pytest.raises(EngineError, match="controlnet"):
        engine(**given, controlnet=torch.ones(1))
    del given["timestep"]
    with pytest.raises(EngineError, match="timestep"):
        engine(**given)


def test_it_looks_like_the_model(engine: Any, model: nn.Module) -> None:
    assert engine.dtype == torch.float32
    assert engine.device == torch.device("cpu")
    assert engine.eval() is engine
    assert engine.to("cpu", torch.float32) is engine
    assert next(engine.parameters()).dtype == torch.float32
    with engine.cache_context("cond"):
        pass
    names = list(inspect.signature(model.forward).parameters)
    assert [p.name for p in engine.manifest.call.parameters] == names


@pytest.mark.parametrize("wanted", ["cuda", torch.bfloat16, torch.device("cuda:1")])
def test_it_does_not_pretend_to_move(engine: Any, wanted: Any) -> None:
    with pytest.raises(EngineError, match=r"the engine runs in torch\.float32 on cpu"):
        engine.to(wanted)


def test_merged_weights_are_stored_once(engine: Any, model: nn.Module) -> None:
    stored = sum(value.nbytes for value in engine.parameters())
    assert stored == sum(p.nbytes for p in model.parameters())
    assert not any("to_q" in name for name in engine.manifest.tensors)


def test_with_a_plan_it_equals_the_compiled_model_and_skips(
    planned: Any, workload: Workload, plan: Any, model: nn.Module
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="ditopt_eager", options={"plan": plan})
    calls = record(workload, "model", seed=0, model=compiled)
    before = ditopt.stats(planned)
    with torch.no_grad():
        errors = [worst_error(planned(**call.kwargs), call.result) for call in calls]
    after = ditopt.stats(planned)
    assert max(errors) < 1e-6
    assert after["full_steps"] - before["full_steps"] == 3
    assert after["skipped_steps"] - before["skipped_steps"] == 3
    assert after["kernels"]["block_sparse_attention"] == 1  # call 3, in the second phase
    torch.compiler.reset()


def test_the_phases_share_what_they_have_in_common(planned: Any, model: nn.Module) -> None:
    stored = sum(value.nbytes for value in planned.parameters() if value.is_floating_point())
    assert stored == sum(p.nbytes for p in model.parameters())
    assert len(planned.manifest.wiring.bodies) == 2
    first, second = planned.manifest.wiring.bodies
    assert [a.program == b.program for a, b in zip(first, second, strict=True)] == [
        True,
        False,
        True,
    ]


def test_it_knows_the_model_that_it_stands_for(engine: Any, model: nn.Module) -> None:
    assert engine.stand_for(model)
    assert not engine.stand_for(nn.Linear(2, 2))
    other = type(model)(layers=3)
    with pytest.warns(DitoptWarning, match="other weights"):
        assert engine.stand_for(other)


class Nested(nn.Module):
    """Arguments and results in containers, a config, a fixed option."""

    config = SimpleNamespace()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.config = {"in_channels": 4, "names": ["a"], "secret": object()}

    def forward(
        self, x: Tensor, extra: dict[str, Tensor], pair: list[Tensor], scale: float = 2.0
    ) -> dict[str, Any]:
        y = self.layer(x) * scale + extra["shift"]
        return {"sample": y, "both": (y + pair[0], [y - pair[1]]), "nothing": None}


def test_containers_config_and_fixed_options_come_through() -> None:
    torch.manual_seed(0)
    module = Nested().eval().requires_grad_(False)
    x, shift, a, b = (torch.randn(2, 4) for _ in range(4))

    def loop(stand_in: Any, seed: int) -> Tensor:
        result: Tensor = stand_in(x, extra={"shift": shift}, pair=[a, b], scale=3.0)["sample"]
        return result

    engine = in_memory(Workload(module, loop))
    result = engine(x, {"shift": shift}, [a, b], 3.0)
    expected = module(x, {"shift": shift}, [a, b], 3.0)
    assert torch.equal(result.sample, expected["sample"])
    assert torch.equal(result["both"][0], expected["both"][0])
    assert torch.equal(result["both"][1][0], expected["both"][1][0])
    assert result.nothing is None
    assert engine.config == {"in_channels": 4, "names": ["a"]}
    assert engine.config.in_channels == 4
    with pytest.raises(EngineError, match=r"^scale: the engine was exported with 3.0, got 2.0"):
        engine(x, {"shift": shift}, [a, b])
    with pytest.raises(EngineError, match=r"^extra.shift: "):
        engine(x, {"shift": shift[:1]}, [a, b], 3.0)


def test_it_takes_the_place_of_a_pipelines_transformer() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=16, in_channels=4, out_channels=8, cross_attention_dim=16,
        norm_type="ada_norm_single", norm_elementwise_affine=False, use_additional_conditions=False,
    ).eval()  # fmt: skip
    pipe = diffusers.PixArtAlphaPipeline(
        None, None, diffusers.AutoencoderKL(latent_channels=4).eval(), transformer,
        diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt": None,
        "prompt_embeds": torch.randn(1, 5, 16),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt": None,
        "negative_prompt_embeds": torch.randn(1, 5, 16),
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "num_inference_steps": 3,
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
    }
    workload = Workload.from_pipeline(pipe, [call])
    expected = workload.run(1)
    engine = in_memory(workload)
    pipe.transformer = engine
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        result = pipe(**call, output_type="latent", generator=generator).images
    assert result.shape == expected.shape
    assert worst_error(result, expected) < 1e-5

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_video.data import FRAMES, MOTIONS, SCENES, SIZE, load_photographs, make_clips
from tiny_video.model import ConditionEmbedding, VideoDiT
from tiny_video.sampler import (
    CHECKPOINT,
    STEPS,
    conditions_of,
    denoise,
    guided_conditions,
    load_checkpoint,
    to_frames,
)
from torch._dynamo.testing import CompileCounter

from ditopt.workload import Workload, load_workload

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (3, 2, 16, 16)  # channels, frames, rows, columns


@pytest.fixture(scope="module")
def trained() -> tuple[VideoDiT, ConditionEmbedding]:
    return load_checkpoint()


@pytest.fixture(scope="module")
def tokens(trained: tuple[VideoDiT, ConditionEmbedding]) -> torch.Tensor:
    return guided_conditions(trained[1], scene=2, motion=5)


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    return load_photographs()


def test_model_is_small() -> None:
    parameters = sum(p.numel() for p in VideoDiT().parameters())
    assert 4e6 < parameters < 7e6


def test_clip_is_2048_tokens() -> None:
    grid = VideoDiT().patch_embedding(torch.zeros(1, 3, FRAMES, SIZE, SIZE)).shape[2:]
    assert tuple(grid) == (8, 16, 16)


def test_checkpoint_is_small() -> None:
    assert CHECKPOINT.stat().st_size <= 16 * 2**20


def test_compiles_to_one_graph(trained, tokens) -> None:
    model, counter = trained[0], CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for time in (900.0, 100.0):
        inputs = torch.randn(2, *SMALL), torch.full((2,), time), tokens
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_bf16_velocity_has_the_shape_and_dtype_of_the_clip() -> None:
    clip = torch.randn(2, *SMALL, dtype=torch.bfloat16)
    model, conditions = load_checkpoint(dtype=torch.bfloat16)
    velocity = model(clip, torch.full((2,), 500.0), guided_conditions(conditions, 2, 5))
    assert velocity.shape == clip.shape
    assert velocity.dtype == torch.bfloat16


def test_sampler_is_deterministic_in_the_seed(trained, tokens) -> None:
    first, again, other = (
        denoise(trained[0], tokens, seed, steps=2, shape=SMALL) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_seeds_cover_every_pair_of_scene_and_motion() -> None:
    assert len({conditions_of(seed) for seed in range(64)}) == len(SCENES) * len(MOTIONS) == 64
    assert len({conditions_of(seed)[0] for seed in range(8)}) == 8
    assert len({conditions_of(seed)[1] for seed in range(8)}) == 8


def test_frames_map_the_range_to_bytes() -> None:
    clip = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    frames = to_frames(clip)
    assert frames.shape == (2, 4, 5, 3)
    assert frames.dtype == np.uint8
    assert frames[0, 0, 0].tolist() == [0, 128, 255]


def test_workload_calls_the_model_once_a_step_with_one_condition_tensor() -> None:
    workload = load_workload(str(EXAMPLES / "tiny_video" / "workload.py"))
    assert isinstance(workload, Workload)
    calls = []

    def stub(hidden_states, timestep, encoder_hidden_states):
        calls.append((float(timestep[0]), id(encoder_hidden_states)))
        assert hidden_states.shape == (2, 3, FRAMES, SIZE, SIZE)
        return hidden_states

    result = workload.run(0, {"model": stub})
    times, conditions = zip(*calls, strict=True)
    assert len(times) == STEPS
    assert list(times) == sorted(times, reverse=True)
    assert times[0] == 1000
    assert len(set(conditions)) == 1
    assert result.abs().max() <= 1
    assert workload.frames(result).shape == (FRAMES, SIZE, SIZE, 3)


@pytest.mark.parametrize("motion", range(len(MOTIONS)), ids=lambda m: MOTIONS[m].replace(" ", "_"))
def test_clips_move_smoothly(photographs, motion: int) -> None:
    scene = torch.arange(2)
    clips = make_clips(photographs, scene, torch.full((2,), motion))
    assert clips.shape == (2, 3, FRAMES, SIZE, SIZE)
    assert clips.min() >= -1
    assert clips.max() <= 1
    steps = (clips[:, :, 1:] - clips[:, :, :-1]).square().mean((1, 2, 3, 4))
    whole = (clips[:, :, -1] - clips[:, :, 0]).square().mean((1, 2, 3))
    assert (steps > 0).all()
    assert (steps < whole).all()


def test_clips_repeat_with_their_generator(photographs) -> None:
    one, two = (
        make_clips(photographs, *torch.arange(4).view(2, 2), generator=torch.manual_seed(7))
        for _ in range(2)
    )
    assert torch.equal(one, two)


def test_trained_model_predicts_the_velocity_of_a_photographed_clip(trained, photographs) -> None:
    scene, motion = torch.tensor([6]), torch.tensor([1])
    generator = torch.Generator().manual_seed(0)
    clip = make_clips(photographs, scene, motion, generator=generator)
    noise = torch.randn(clip.shape, generator=generator)
    velocity = trained[0](
        0.5 * clip + 0.5 * noise, torch.tensor([500.0]), trained[1](scene, motion)
    )
    error = (velocity - (noise - clip)).square().mean()
    assert error < 0.05  # of a variance above 1

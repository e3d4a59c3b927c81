"""Real diffusers pipelines with tiny random weights; nothing is downloaded."""

import numpy as np
import pytest
import torch

from ditopt.errors import WorkloadError
from ditopt.pipelines import find_denoisers
from ditopt.workload import Workload, load_workload

diffusers = pytest.importorskip("diffusers")

VAE = {
    "sample_size": 16,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}


def pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    )
    pipe = diffusers.PixArtAlphaPipeline(
        None,
        None,
        diffusers.AutoencoderKL(**VAE).eval(),
        transformer.eval(),
        diffusers.DPMSolverMultistepScheduler(),
    )
    call = {
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
    return pipe, call


def wan(experts=1):
    def transformer():
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ).eval()

    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[0, 1, 1]
    )
    pipe = diffusers.WanPipeline(
        None,
        None,
        vae.eval(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(),
        transformer_2=transformer() if experts == 2 else None,
        boundary_ratio=0.8 if experts == 2 else None,
    )
    call = {
        "prompt_embeds": torch.randn(1, 6, 32),
        "negative_prompt_embeds": torch.randn(1, 6, 32),
        "num_inference_steps": 4,
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "guidance_scale": 3.0,
    }
    return pipe, call


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    vae = diffusers.AutoencoderKL(**{**VAE, "latent_channels": 1, "shift_factor": 0.1}).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer.eval())
    call = {
        "prompt_embeds": torch.randn(1, 6, 32),
        "pooled_prompt_embeds": torch.randn(1, 32),
        "num_inference_steps": 3,
        "height": 8,
        "width": 8,
    }
    return pipe, call


@pytest.mark.parametrize(
    ("build", "branches", "calls"), [(pixart, 1, 3), (wan, 2, 4), (flux, 1, 3)]
)
def test_a_pipeline_runs_through_the_given_callable(build, branches, calls):
    torch.manual_seed(0)
    pipe, call = build()
    workload = Workload.from_pipeline(pipe, [call])
    dense = workload.run(0)
    seen = []

    def count(*args, **kwargs):
        seen.append(kwargs)
        return workload.models["model"](*args, **kwargs)

    assert torch.equal(workload.run(0, {"model": count}), dense)
    assert not torch.equal(workload.run(1), dense)
    trace = workload.trace()["model"]
    assert (trace.branches, trace.calls_per_branch) == (branches, calls)
    assert len(seen) == len(trace.calls)
    assert trace.varying == ("hidden_states", "timestep")
    assert pipe.transformer is workload.models["model"]


def test_two_experts_share_one_loop():
    torch.manual_seed(0)
    pipe, call = wan(experts=2)
    workload = Workload.from_pipeline(pipe, [call])
    traces = workload.trace()
    assert list(traces) == ["transformer", "transformer_2"]
    assert min(traces["transformer"].timesteps) > max(traces["transformer_2"].timesteps)
    assert sum(trace.calls_per_branch for trace in traces.values()) == 4


def test_seeds_take_turns_over_the_calls():
    torch.manual_seed(0)
    pipe, call = flux()
    other = {**call, "prompt_embeds": torch.randn(1, 6, 32), "output_type": "np"}
    workload = Workload.from_pipeline(pipe, [call, other])
    assert workload.run(0).shape == workload.run(2).shape == (1, 4, 4)
    assert workload.run(1).shape == (1, 8, 8, 3)


def test_the_pipeline_is_as_before_even_after_an_error():
    pipe, call = flux()
    workload = Workload.from_pipeline(pipe, [call])
    pipe.set_progress_bar_config(leave=False)

    def fails(*args, **kwargs):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        workload.run(0, {"model": fails})
    assert pipe.transformer is workload.models["model"]
    assert pipe._progress_bar_config == {"leave": False}


def test_bad_calls_are_named():
    pipe, call = flux()
    with pytest.raises(WorkloadError, match="call 0: FluxPipeline takes no argument 'promt'"):
        Workload.from_pipeline(pipe, [{"promt": "a fox"}])
    with pytest.raises(WorkloadError, match="must be a list of dicts"):
        Workload.from_pipeline(pipe, call)
    with pytest.raises(WorkloadError, match=r"returned Image, which is no tensor.*output_type"):
        Workload.from_pipeline(pipe, [{**call, "output_type": "pil"}]).run(0)


def test_a_pipeline_without_transformer_lists_its_components():
    pipe, _ = pixart()
    pipe.register_modules(transformer=None)
    with pytest.raises(
        WorkloadError, match=r"no component named 'transformer' \(components: .*vae"
    ):
        find_denoisers(pipe)


def test_a_saved_pipeline_is_loaded_by_its_folder(tmp_path):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_elementwise_affine=False,
    )
    vae = diffusers.AutoencoderKL(**VAE)
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    workload = load_workload(f"diffusers:{tmp_path}")
    assert workload.title == "DiTPipeline"
    assert workload.origin == f"diffusers:{tmp_path}"
    found = next(iter(workload.models.values()))
    assert isinstance(found, diffusers.DiTTransformer2DModel)
    assert np.prod(workload.run(0).shape) > 0

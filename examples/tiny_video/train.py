"""Trains the tiny video model: `cd examples && python -m tiny_video.train --out DIR`.

Rectified flow: x_t = (1 - t) clip + t noise, target noise - clip, logit-normal times shifted
towards noise. The learning rate follows the clock and not a step count, so that a run ends finished
after the same minutes on any GPU. The weights that are written are an exponential moving average.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .data import FRAMES, MOTIONS, SCENES, SIZE, load_photographs, make_clips
from .model import ConditionEmbedding, VideoDiT
from .sampler import (
    STEPS,
    Denoiser,
    conditions_of,
    denoise,
    guided_conditions,
    load_checkpoint,
    save_checkpoint,
    shift_times,
    to_frames,
)


@dataclass
class Recipe:
    """Everything that a run depends on besides the photographs."""

    minutes: float = 8.0
    batch: int = 64
    learning_rate: float = 1e-3
    final_rate: float = 0.01  # of the peak learning rate, at the end
    warmup_steps: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    dropped_conditions: float = 0.1
    frames: int = FRAMES
    size: int = SIZE
    seed: int = 0
    compile: bool = True


@dataclass
class Log:
    """The loss curve: one point per `every` steps, the mean since the last."""

    every: int = 50
    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


def flow_loss(model: Denoiser, clip: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """Mean squared error of the velocity for clips [B, 3, F, H, W] and conditions [B, L, width]."""
    t = shift_times(torch.sigmoid(torch.randn(clip.shape[0], device=clip.device)))
    noise = torch.randn_like(clip)
    mix = t.view(-1, 1, 1, 1, 1)
    with torch.autocast(clip.device.type, torch.bfloat16, enabled=clip.is_cuda):
        velocity = model(torch.lerp(clip, noise, mix), 1000 * t, encoder_hidden_states)
    return F.mse_loss(velocity.float(), noise - clip)


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Linear warm-up over steps, then a cosine over the run's progress in [0, 1] by the clock."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return recipe.learning_rate * warmup * max(cosine, recipe.final_rate)


def draw_batch(
    recipe: Recipe, photographs: Tensor, conditions: ConditionEmbedding
) -> tuple[Tensor, Tensor]:
    """Random clips [batch, 3, F, H, W] and their condition tokens [batch, L, width], some null."""
    device = photographs.device
    scene = torch.randint(len(SCENES), (recipe.batch,), device=device)
    motion = torch.randint(len(MOTIONS), (recipe.batch,), device=device)
    clip = make_clips(photographs, scene, motion, recipe.frames, recipe.size)
    dropped = torch.rand(recipe.batch, device=device) < recipe.dropped_conditions
    scene = scene.masked_fill(dropped, conditions.null_scene)
    return clip, conditions(scene, motion.masked_fill(dropped, conditions.null_motion))


def train(recipe: Recipe, out: Path, device: torch.device, max_steps: int | None = None) -> None:
    """Train until the clock or `max_steps` says stop, writing results every two minutes."""
    start = time.monotonic()
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has faulted on some GPUs
    photographs = load_photographs(device)
    conditions = ConditionEmbedding(len(SCENES), len(MOTIONS))
    pair = nn.ModuleDict({"model": VideoDiT(), "conditions": conditions}).to(device)
    ema = AveragedModel(pair, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    model = torch.compile(pair["model"]) if recipe.compile else pair["model"]
    optimizer = torch.optim.AdamW(
        pair.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    log, running = Log(), torch.zeros((), device=device)
    step, last_write = 0, start
    while (seconds := time.monotonic() - start) < 60 * recipe.minutes and step != max_steps:
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, seconds / 60 / recipe.minutes)
        clip, tokens = draw_batch(recipe, photographs, conditions)
        loss = flow_loss(model, clip, tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        # Averaging starts after the warm-up, so that it never remembers the random weights.
        if step >= recipe.warmup_steps:
            ema.update_parameters(pair)
        running += loss.detach()
        step += 1
        if step % log.every == 0:
            log.step.append(step)
            log.seconds.append(round(time.monotonic() - start, 1))
            log.loss.append(round(running.item() / log.every, 5))
            running.zero_()
            print(f"step {step:6d}  {log.seconds[-1]:6.1f} s  loss {log.loss[-1]:.5f}", flush=True)
        if time.monotonic() - last_write > 120:
            last_write = time.monotonic()
            write_results(ema.module, recipe, log, out)
    write_results(ema.module, recipe, log, out)


def write_results(pair: nn.ModuleDict, recipe: Recipe, log: Log, out: Path) -> None:
    """Write checkpoint.safetensors, loss.json, loss.png and samples.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(pair["model"], pair["conditions"], out / "checkpoint.safetensors")
    device = next(pair.parameters()).device
    write_log(log, out, pair["model"], recipe=vars(recipe), model=pair["model"].config.as_dict())
    sample_sheet(out / "checkpoint.safetensors", out / "samples.png", device)


def write_log(log: Log, out: Path, trained: nn.Module, **settings: object) -> None:
    """Write loss.json, with the settings and where the model was trained, and loss.png."""
    device = next(trained.parameters()).device
    record = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in trained.parameters()),
        **settings,
        "steps": log.step[-1] if log.step else 0,
        "final_loss": round(sum(log.loss[-10:]) / max(len(log.loss[-10:]), 1), 5),
        "curve": {"step": log.step, "seconds": log.seconds, "loss": log.loss},
    }
    (out / "loss.json").write_text(json.dumps(record, indent=1) + "\n")
    plot_loss(log, out / "loss.png")


def plot_loss(log: Log, path: Path) -> None:
    """The loss curve as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(log.step, log.loss, linewidth=1)
    axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def sample_sheet(
    checkpoint: Path, path: Path, device: torch.device, seeds: int = 8, steps: int = STEPS
) -> None:
    """One row of frames per seed, from the weights as written and in fp32."""
    model, conditions = load_checkpoint(checkpoint, device)
    rows = []
    for seed in range(seeds):
        tokens = guided_conditions(conditions, *conditions_of(seed))
        rows.append(np.concatenate(to_frames(denoise(model, tokens, seed, steps)), axis=1))
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(
        path, optimize=True
    )


def main() -> None:
    """Command line; the defaults are the recipe of the shipped checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--max-steps", type=int, default=None, help="stop earlier, for a trial run")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    args = parser.parse_args()
    recipe = Recipe(minutes=args.minutes, batch=args.batch, compile=not args.no_compile)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train(recipe, args.out, device, args.max_steps)


if __name__ == "__main__":
    main()

"""Trains the larger video model: `cd examples && python -m wan_video.train --out DIR`.

As tiny_video is trained, at 4,096 tokens (16 frames of 64 x 64 pixels) and finished at 16,384
(128 x 128). 8 minutes by the clock; weights are an exponential moving average. Muon trains the
blocks' matrices (github.com/KellerJordan/Muon, scaled as in arXiv 2502.16982), AdamW the rest.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_video.data import load_photographs
from tiny_video.sampler import conditions_of, denoise, guided_conditions, to_frames
from tiny_video.train import Log, Recipe, draw_batch, flow_loss, learning_rate, write_log
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .workload import FRAMES, GUIDANCE, SIZE, STEPS, build, save_checkpoint, velocity_of

PHOTO_SIZE = 384


@dataclass(frozen=True)
class Stage:
    """A part of the training at one size; the learning rate falls over each."""

    minutes: float
    batch: int
    size: int
    learning_rate: float


STAGES = (Stage(5.5, 16, SIZE // 2, 1e-3), Stage(2.5, 4, SIZE, 3e-4))


def train(stages: tuple[Stage, ...], out: Path, device: torch.device) -> None:
    """Train through the stages by the clock, then write the results."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has faulted on some GPUs
    torch._dynamo.config.automatic_dynamic_shapes = False
    photographs = load_photographs(device, PHOTO_SIZE)
    model, conditions = build()
    pair = nn.ModuleDict({"model": model, "conditions": conditions}).to(device)
    ema = AveragedModel(pair, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    if device.type == "cuda":
        model.compile_repeated_blocks()
    optimizers = optimizers_of(model, pair)
    log, started = Log(), time.monotonic()
    for stage in stages:
        run_stage(stage, model, pair, ema, optimizers, photographs, log, started)
    write_results(ema.module, stages, log, out)


def optimizers_of(model: nn.Module, pair: nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the blocks' matrices, AdamW for all else; the same learning rate suits both."""
    matrices = [
        p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2
    ]
    chosen = set(map(id, matrices))
    others = [p for p in pair.parameters() if id(p) not in chosen]
    return (
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
    )


def run_stage(
    stage: Stage,
    model: nn.Module,
    pair: nn.ModuleDict,
    ema: AveragedModel,
    optimizers: tuple[torch.optim.Optimizer, ...],
    photographs: Tensor,
    log: Log,
    started: float,
) -> None:
    """Train at one size until its minutes are over."""
    recipe = Recipe(
        minutes=stage.minutes,
        batch=stage.batch,
        learning_rate=stage.learning_rate,
        warmup_steps=100,
        frames=FRAMES,
        size=stage.size,
    )
    running, begun, step = torch.zeros((), device=photographs.device), time.monotonic(), 0
    while (seconds := time.monotonic() - begun) < 60 * stage.minutes:
        rate = learning_rate(recipe, step, seconds / 60 / stage.minutes)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        clip, tokens = draw_batch(recipe, photographs, pair["conditions"])
        loss = flow_loss(velocity_of(model), clip, tokens)
        pair.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if log.step or step >= recipe.warmup_steps:
            ema.update_parameters(pair)
        running += loss.detach()
        step += 1
        if step % log.every == 0:
            log.step.append((log.step[-1] if log.step else 0) + log.every)
            log.seconds.append(round(time.monotonic() - started, 1))
            log.loss.append(round(running.item() / log.every, 5))
            running.zero_()
            print(f"{stage.size} px, step {step}, {log.seconds[-1]} s: {log.loss[-1]}", flush=True)


def write_results(pair: nn.ModuleDict, stages: tuple[Stage, ...], log: Log, out: Path) -> None:
    """Write checkpoint.safetensors, loss.json, loss.png and samples.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(pair["model"], pair["conditions"], out / "checkpoint.safetensors")
    device = next(pair.parameters()).device
    write_log(log, out, pair["model"], stages=[vars(stage) for stage in stages])
    pair.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    rows = []
    for seed in range(4):
        tokens = guided_conditions(pair["conditions"], *conditions_of(seed))
        shape = (3, FRAMES, stages[-1].size, stages[-1].size)
        clip = denoise(velocity_of(pair["model"]), tokens, seed, STEPS, GUIDANCE, shape)
        rows.append(np.concatenate(to_frames(clip)[::2], axis=1))
    Image.fromarray(np.concatenate(rows)).save(out / "samples.png", optimize=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, nargs=2, help="of the two stages")
    parser.add_argument("--small", action="store_true", help="small pictures, for a dry run")
    args = parser.parse_args()
    stages = STAGES
    if args.minutes:
        stages = tuple(replace(s, minutes=m) for s, m in zip(stages, args.minutes, strict=True))
    if args.small:
        stages = tuple(replace(s, size=16, batch=2) for s in stages)
    train(stages, args.out, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()

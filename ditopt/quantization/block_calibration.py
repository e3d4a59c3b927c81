"""Codebooks calibrated block by block on the model's own trajectory, without data (VQ4DiT).

The float model samples from noise; what goes into each block and comes out of it is recorded at
some calls. Then the block runs with mixtures of candidate words (`assignments`) in place of its
weights, and words and ratios are learned so that it gives what the float block gave. The result is
kept where the decided words are nearer to the float block than k-means' words are.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from ditopt.progress import Progress, silent
from ditopt.quantization.assignments import Assignments
from ditopt.quantization.codebook import Codebook

if TYPE_CHECKING:
    from ditopt.sites import LinearSite
    from ditopt.torch_backend import Compiled
    from ditopt.workload import Workload

Example = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Arguments of a block, by place and by name, and what it returned."""


@dataclass(frozen=True)
class Calibration:
    """Settings; see `recipes.quantization.rules.CalibratedCodebook` for the published ones."""

    nearest: int = 2
    steps: int = 500
    words_rate: float = 1e-4
    ratio_rate: float = 5e-2
    settled: float = 0.99


@dataclass(frozen=True)
class BlockRecord:
    """One block: squared error of its output, relative to k-means' words at the same call.

    Attributes:
        path: of the module.
        after: with the decided words, mean over calls; above 1, k-means' words are kept.
        decided: share of the pieces that ratios had decided at half of the steps.
    """

    path: str
    after: float
    decided: float


def blocks_of(graph: Compiled, sites: Sequence[LinearSite]) -> dict[str, list[str]]:
    """Layers by the path of the block that holds them."""
    found: dict[str, list[str]] = {}
    for site in sites:
        found.setdefault(graph.pieces[site.piece][1], []).append(site.id)
    return found


def calibrate(
    workload: Workload,
    blocks: Mapping[str, Sequence[str]],
    settings: Calibration,
    *,
    seed: int = 0,
    calls: int = 8,
    progress: Progress = silent,
) -> tuple[dict[str, Tensor], list[BlockRecord]]:
    """Codes and words of every layer for a plan's side file.

    Args:
        workload: a model and its denoising loop.
        blocks: layers by the path of their block, as `blocks_of` gives them.
        settings: of the optimization.
        seed: of the noise that the trajectory starts from.
        calls: recorded calls of each block.
        progress: told after each block.
    """
    from ditopt.profiling.loops import only_model

    model = only_model(workload)
    examples = record(workload, model, list(blocks), seed, calls)
    tensors: dict[str, Tensor] = {}
    told = []
    for number, (path, layers) in enumerate(blocks.items()):
        parts, report = _calibrate_block(model, path, layers, examples.pop(path), settings)
        told.append(report)
        tensors |= {
            f"linear/{name}/{layer}": value.cpu().contiguous()
            for layer, made in parts.items()
            for name, value in made.items()
        }
        progress("codebooks", number + 1, len(blocks))
    return tensors, told


def record(
    workload: Workload, model: nn.Module, paths: Sequence[str], seed: int, calls: int
) -> dict[str, list[Example]]:
    """Arguments and results of each block at some calls of one loop, drawn evenly.

    Blocks are recorded at the same calls, since each draws the same numbers.
    """
    found: dict[str, list[Example]] = {path: [] for path in paths}
    draws = {path: torch.Generator().manual_seed(0) for path in paths}
    seen = dict.fromkeys(paths, 0)

    def hook(path: str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[path] += 1
            place = len(found[path])
            if place >= calls:
                place = int(torch.randint(seen[path], (1,), generator=draws[path]))
            if place < calls:
                found[path][place : place + 1] = [tree_map(_copied, (args, kwargs, output))]

        return keep

    modules = [(path, model.get_submodule(path)) for path in paths]
    handles = [m.register_forward_hook(hook(path), with_kwargs=True) for path, m in modules]
    try:
        with torch.no_grad():
            workload.run(seed, workload.models)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _copied(value: Any) -> Any:
    # Outside of inference mode, so that the copy may be part of a gradient's graph.
    with torch.inference_mode(False):
        return value.detach().clone() if isinstance(value, Tensor) else value


def _calibrate_block(
    model: nn.Module,
    path: str,
    layers: Sequence[str],
    examples: Sequence[Example],
    settings: Calibration,
) -> tuple[dict[str, dict[str, Tensor]], BlockRecord]:
    block = model.get_submodule(path)
    weights = {layer: model.get_parameter(f"{layer}.weight").detach() for layer in layers}
    soft = {layer: Assignments(w.float(), settings.nearest) for layer, w in weights.items()}
    first = {layer: _nearest_parts(one) for layer, one in soft.items()}

    def error(given: Mapping[str, Tensor], example: Example) -> Tensor:
        args, kwargs, target = example
        own = {f"{k.removeprefix(path + '.')}.weight": w.to(weights[k]) for k, w in given.items()}
        result = functional_call(block, own, args, kwargs)
        pairs = zip(tree_leaves(result), tree_leaves(target), strict=True)
        errors = [(y - t).float().square().mean() for y, t in pairs if isinstance(t, Tensor)]
        return torch.stack(errors).sum()

    @torch.no_grad()
    def errors(parts: Mapping[str, Mapping[str, Tensor]]) -> list[float]:
        given = {k: _decoded(made, weights[k]) for k, made in parts.items()}
        return [max(float(error(given, example)), 1e-30) for example in examples]

    # Of each call its own, since errors differ by orders of magnitude over the trajectory.
    start = errors(first)
    optimizer = torch.optim.RMSprop(
        [
            {"params": [one.words for one in soft.values()], "lr": settings.words_rate},
            {"params": [one.logits for one in soft.values()], "lr": settings.ratio_rate},
        ],
        alpha=0.9,
    )
    decided = 0.0
    for step in range(settings.steps):
        with torch.enable_grad():
            mixed = {layer: one.weight() for layer, one in soft.items()}
            undecided = torch.stack([one.undecided() for one in soft.values()]).mean()
            turn = step % len(examples)
            loss = error(mixed, examples[turn]) / start[turn] + undecided
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step == settings.steps // 2:
            decided = _decided(soft, settings.settled)
        for one in soft.values():
            # What is left undecided at half of the steps is decided, so that words fit decisions.
            one.settle(settings.settled if 2 * step < settings.steps else 0.0)
    last = {layer: one.parts() for layer, one in soft.items()}
    after = statistics.fmean(b / a for a, b in zip(start, errors(last), strict=True))
    report = BlockRecord(path, after, decided)
    return (last if after <= 1 else first), report


def _nearest_parts(soft: Assignments) -> dict[str, Tensor]:
    """K-means' words, each piece with its nearest: where the calibration begins."""
    return {name: value.clone() for name, value in soft.parts().items()}


def _decided(soft: Mapping[str, Assignments], share: float) -> float:
    return float(torch.cat([one.ratios.amax(1) > share for one in soft.values()]).float().mean())


def _decoded(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    n, k = weight.shape
    made: Tensor = Codebook().decode(parts, n, k, torch.float32)
    return made

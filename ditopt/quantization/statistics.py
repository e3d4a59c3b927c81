"""What the inputs of linear layers look like, channel by channel and row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class InputStatistics:
    """Running statistics of one layer's input, float64 on its device.

    Attributes:
        amax: [K] largest magnitude of each channel.
        total, square: [K] sums of values and of squares.
        rows: number of rows seen.
    """

    amax: Tensor
    total: Tensor
    square: Tensor
    rows: int = 0

    @classmethod
    def empty(cls, k: int, device: torch.device) -> InputStatistics:
        """Of no rows."""
        zeros = torch.zeros(3, k, dtype=torch.float64, device=device)
        return cls(zeros[0], zeros[1], zeros[2])

    def add(self, x: Tensor) -> None:
        """Take in the rows of x [..., K]."""
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        self.amax = torch.maximum(self.amax, rows.abs().amax(0))
        self.total += rows.sum(0)
        self.square += rows.square().sum(0)
        self.rows += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        """[K] mean of each channel."""
        return self.total / max(self.rows, 1)

    def outliers(self) -> dict[str, float]:
        """How hard the input is to round.

        Returns:
            `incoherence`: largest over mean channel maximum. `dc_ratio`: norm of the mean over the
            root mean square. `rms`: LRQ-DiT's criterion J (arXiv 2508.03485). `top8_energy`: share
            of the energy in the eight largest channels.
        """
        energy = self.square / max(self.rows, 1)
        whole = float(energy.sum())
        top = float(energy.topk(min(8, len(energy))).values.sum())
        return {
            "incoherence": float(self.amax.max() / self.amax.mean().clamp(min=1e-30)),
            "dc_ratio": float(self.mean.norm() / max(whole, 1e-30) ** 0.5),
            "rms": (whole / len(energy)) ** 0.5,
            "top8_energy": top / max(whole, 1e-30),
        }


def fluctuation(seen: InputStatistics, weight: Tensor) -> float:
    """LRQ-DiT's criterion J (arXiv 2508.03485): root mean square of the balanced input.

    The balance is the paper's, ``s = sqrt(max|x_c| / max_o|W_oc|)``, which unlike
    `transforms.balance_scales` is not normalised; channels that are zero on either side keep s = 1.

    Args:
        seen: of the input.
        weight: [N, K].
    """
    columns = weight.abs().amax(0).to(seen.amax)
    usable = (seen.amax > 0) & (columns > 0)
    squared = torch.where(usable, seen.amax / columns, torch.ones_like(columns))
    return float((seen.square / max(seen.rows, 1) / squared).mean().sqrt())


def plan_tensors(statistics: dict[str, InputStatistics]) -> dict[str, Tensor]:
    """The statistics that transforms need, named as a plan's side file names them."""
    found = {}
    for layer, seen in statistics.items():
        found[f"linear/amax/{layer}"] = seen.amax.float().cpu()
        found[f"linear/mean/{layer}"] = seen.mean.float().cpu()
    return found


def range_tensors(ranges: dict[str, list[InputStatistics]]) -> dict[str, Tensor]:
    """Largest magnitudes [R, K] of each channel in each range of calls, for static scales."""
    return {
        f"linear/range_amax/{layer}": torch.stack([seen.amax for seen in found]).float().cpu()
        for layer, found in ranges.items()
    }


@contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, InputStatistics]]:
    """Statistics of every linear layer's input, by module path, while the model runs eagerly."""
    found: dict[str, InputStatistics] = {}

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if name not in found:
                found[name] = InputStatistics.empty(x.shape[-1], x.device)
            found[name].add(x)

        return look

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

"""Which executor runs one attention: the one with the smallest forecast time of those that can.

Executors are `gluon` (the operator itself on Hopper), `fa4`, `flex`, `triton` and `cpu` for lists,
and `sdpa` or `fa4_dense` for attention whose heads are all dense. A forecast is

    max(host, start + (tile x query blocks + entry x kept blocks) / processors)   [microseconds]

with coefficients measured per device, head size and block size: ``costs`` in configs.yaml, fitted
by benchmarks/attention_costs.py and, for one thread of a CPU, attention_costs_cpu.py; a CPU has as
many processors as PyTorch has threads. Nothing is timed while serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .configs import costs_of

if TYPE_CHECKING:
    from torch import Tensor

PREFERENCE = ("gluon", "fa4", "cpu", "flex", "triton")
"""Order where nothing was measured: see the README for the figures behind it."""
DENSE = ("sdpa", "fa4_dense")


@dataclass(frozen=True)
class Site:
    """One attention with block lists: sizes, and the kept fraction of each head's blocks."""

    batch: int
    n_q: int
    n_k: int
    channels: int
    block_q: int
    block_k: int
    densities: tuple[float, ...]

    def heads(self, first: int, end: int) -> Site:
        """The same with some of the heads."""
        return Site(**{**vars(self), "densities": self.densities[first:end]})

    @property
    def rows(self) -> int:
        """Query blocks of all heads and batches."""
        return self.batch * len(self.densities) * -(-self.n_q // self.block_q)

    @property
    def entries(self) -> float:
        """Kept pairs of blocks."""
        per_head = -(-self.n_q // self.block_q) * -(-self.n_k // self.block_k)
        return self.batch * per_head * sum(self.densities)


@dataclass(frozen=True)
class Choice:
    """An executor, why, and the dense heads that leave the launch for `sdpa`."""

    executor: str
    reason: str
    dense_heads: tuple[int, ...] = ()


def forecast(executor: str, site: Site, device: str) -> float | None:
    """Milliseconds of one call, or None where nothing was measured for it."""
    cost = _closest(device, executor, site)
    if cost is None:
        return None
    # Blocks of an unmeasured size cost what their area costs.
    area = site.block_q * site.block_k / (cost["block"][0] * cost["block"][1])
    work = cost["tile"] * site.rows + cost["entry"] * area * site.entries
    processors = torch.get_num_threads() if device == "cpu" else cost["processors"]
    return float(max(cost["host"], cost["start"] + work / processors) / 1e3)


def _closest(device: str, executor: str, site: Site) -> Mapping[str, Any] | None:
    """The entry for the smallest head size that covers the site's and the nearest block area."""
    entries = [e for e in costs_of(device) if e["executor"] == executor]
    if not entries:
        return None

    def distance(entry: Mapping[str, Any]) -> tuple[bool, int, int, int]:
        q, k = entry["block"]
        short = entry["channels"] < site.channels
        here = site.block_q * site.block_k
        return short, abs(entry["channels"] - site.channels), abs(q * k - here), abs(q - k)

    return min(entries, key=distance)


def choose(site: Site, device: str, declined: Mapping[str, str]) -> Choice:
    """The executor for a site on a device (a GPU's name, or ``cpu``).

    Args:
        site: the attention.
        device: as ``torch.cuda.get_device_name`` says it.
        declined: why an executor cannot run the site; `sdpa` can wherever all heads are dense.
    """
    able = [name for name in PREFERENCE if name not in declined]
    if not able:
        return Choice("operator", "the operator itself: " + _declines(declined))
    times = {name: t for name in able if (t := forecast(name, site, device)) is not None}
    dense = tuple(h for h, density in enumerate(site.densities) if density >= 1.0)
    every = len(dense) == len(site.densities) and "sdpa" not in declined
    if not times and every:
        return Choice(
            "sdpa", f"sdpa, every head is dense: no costs were measured on {device}", dense
        )
    if not times:
        rest = f" {_declines(declined)}" if declined else ""
        return Choice(able[0], f"{able[0]}: no costs were measured on {device}.{rest}")
    best = min(times, key=times.__getitem__)
    if every:
        whole = choose_dense(site, device, declined)
        if whole is not None and whole[1] * _PAYS < times[best]:
            words = _listing({whole[0]: whole[1], **times})
            return Choice(whole[0], f"{whole[0]}, every head is dense: {words}", dense)
    elif dense and "sdpa" not in declined:
        apart = _apart(site, dense, best, device)
        if apart is not None and apart < times[best] * _PAYS:
            words = _listing({"apart": apart, **times})
            text = f"{best}, and sdpa for {len(dense)} dense heads: {words}"
            return Choice(best, text + _tail(declined), dense)
    return Choice(best, f"{best}: {_listing(times)}{_tail(declined)}")


def choose_dense(site: Site, device: str, declined: Mapping[str, str]) -> tuple[str, float] | None:
    """The executor for dense attention and its forecast in milliseconds; None without costs."""
    able = [
        name
        for name in DENSE
        if name not in declined and (name != "fa4_dense" or "fa4" not in declined)
    ]
    times = {name: t for name in able if (t := forecast(name, site, device)) is not None}
    return min(times.items(), key=lambda item: item[1]) if times else None


def _apart(site: Site, dense: Sequence[int], executor: str, device: str) -> float | None:
    """Forecast with the dense heads in `sdpa`, each run of neighbours in a call of its own."""
    total, groups = 0.0, runs(len(site.densities), dense)
    for first, end in groups:
        name = "sdpa" if first in dense else executor
        part = forecast(name, site.heads(first, end), device)
        if part is None:
            return None
        total += part
    if len(groups) > 1:  # the parts are joined: 16-bit outputs are read and written once more
        moved = 4.0 * site.batch * len(site.densities) * site.n_q * site.channels
        total += moved / _BYTES_PER_MS.get(device, _GPU_BYTES_PER_MS)
    return total


_PAYS = 0.97
"""Of the simpler choice's time (dense attention, one launch), what the other must stay below."""
_GPU_BYTES_PER_MS = 3e9
"""Copies in device memory, on the slow side of the measured GPU (4.2e9): a split has to pay."""
_BYTES_PER_MS = {"cpu": 4e6}
"""The same elsewhere."""


def runs(heads: int, dense: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open ranges of neighbouring heads that are all in ``dense`` or all not."""
    kinds = [head in dense for head in range(heads)]
    starts = [h for h in range(heads) if h == 0 or kinds[h] != kinds[h - 1]]
    return list(zip(starts, [*starts[1:], heads], strict=True))


def _listing(times: Mapping[str, float]) -> str:
    ordered = sorted(times.items(), key=lambda item: item[1])
    return ", ".join(f"{name} {ms:.3g} ms" for name, ms in ordered) + " forecast"


def _declines(declined: Mapping[str, str]) -> str:
    return "; ".join(dict.fromkeys(declined.values()))


def _tail(declined: Mapping[str, str]) -> str:
    return f". {_declines(declined)}" if declined else ""


def reasons_to_decline(q: Tensor, block_q: int, block_k: int) -> dict[str, str]:
    """Why executors cannot run a call with such a ``q``, by name; those not named can."""
    from . import cpu_native, fa4, flex, ops_lse

    on_cuda = q.device.type == "cuda"
    found = {
        "gluon": "the Gluon kernel needs a CUDA device",
        "fa4": fa4.reason_to_decline(q, block_q, block_k),
        "flex": flex.reason_to_decline(q, block_q, block_k),
        "triton": ops_lse.reason_to_decline_triton(q, block_q, block_k),
        "cpu": cpu_native.reason_to_decline(q),  # its fallback is slower than FlexAttention
    }
    if on_cuda:
        from . import hopper  # needs Triton

        found["gluon"] = hopper.reason_to_decline(q, block_q, block_k)
    return {name: reason for name, reason in found.items() if reason is not None}

"""Launch configurations, read once from configs.yaml beside this file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

FILE = Path(__file__).with_name("configs.yaml")


@dataclass(frozen=True)
class HopperConfig:
    """One entry under ``hopper``, whose comment says what is what: up to ``channels`` channels."""

    consumers: int
    block_k: int
    channels: int
    k_stages: int
    v_stages: int
    q_stages: int
    block_n: int | None = None
    ahead: bool = False
    overlap: bool = True
    pingpong: bool = False
    q_registers: bool = False
    rescale: Literal["soon", "late", "lazy"] = "soon"
    programs_per_processor: int = 1
    max_registers: int | None = None

    @property
    def keys(self) -> int:
        """Keys of a tile: the whole entry of a list unless ``block_n`` says less."""
        return self.block_n or self.block_k

    @property
    def worker_registers(self) -> int:
        """What is left for each thread of the second consumer once the producer has its 24."""
        return (3 * (self.max_registers or 168) - 24) // 2 // 8 * 8


@dataclass(frozen=True)
class PlainConfig:
    """One entry under ``plain``: query rows, keys per step, warps, software-pipelining depth.

    ``lazy`` as in `triton_softmax`.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    lazy: bool = False


@lru_cache
def _entries(gpu: str, kernel: str) -> tuple[dict[str, Any], ...]:
    """The entries of ``gpu``, or of the first GPU in the file where it has none."""
    tables: dict[str, dict[str, list[dict[str, Any]]]] = yaml.safe_load(FILE.read_text())
    return tuple(tables[gpu if kernel in tables.get(gpu, ()) else next(iter(tables))][kernel])


def _smallest(entries: list[dict[str, Any]], channels: int) -> dict[str, Any]:
    """The entry with the fewest channels that still covers ``channels``."""
    return min((e for e in entries if e["channels"] >= channels), key=lambda e: int(e["channels"]))


@lru_cache
def costs_of(device: str) -> tuple[dict[str, Any], ...]:
    """Measured costs of executors on a device, see `dispatch`; empty where there are none."""
    tables: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())
    return tuple(tables.get(device, {}).get("costs", ()))


@lru_cache
def hopper_config(gpu: str, consumers: int, block_k: int, channels: int) -> HopperConfig:
    """Rings, order of loads, occupancy of one launch of the Gluon kernel at ``channels``."""
    wanted = [
        e for e in _entries(gpu, "hopper") if (e["consumers"], e["block_k"]) == (consumers, block_k)
    ]
    return HopperConfig(**_smallest(wanted, channels))


@lru_cache
def plain_config(
    gpu: str, block_q: int, block_k: int, channels: int, *, options: bool = False
) -> PlainConfig:
    """Tiles of one launch of the plain kernel, with or without options, for these lists' blocks."""
    rows = 128 if block_q >= 128 else 64
    wanted = [e for e in _entries(gpu, "plain") if e["block_q"] == rows]
    entry = dict(_smallest(wanted, channels))
    del entry["block_q"], entry["channels"]
    changes = entry.pop("with_options", {})
    config = PlainConfig(**entry | (changes if options else {}))
    block_m, block_n = min(config.block_m, block_q), min(config.block_n, block_k)
    config = replace(config, block_m=block_m, block_n=block_n)
    if block_k < 64:  # several entries fill a tile
        block_n, num_stages = 32 if block_q == 16 else 64, min(3, config.num_stages)
        config = replace(config, block_n=block_n, num_stages=num_stages)
    if block_q < 64:
        return replace(config, num_warps=block_q // 16)
    # Options take registers; of 8 warps only one program would fit a multiprocessor.
    if options and config.block_n <= 64:
        return replace(config, num_warps=4, lazy=False)
    return config

"""Measured tables of operators, kept for the next profile on the same machine.

A table belongs to the device's name, PyTorch, ditopt, the number of threads, the block sizes and
the operands' shape; another of any of them is measured anew. Tables are JSON files in
``$XDG_CACHE_HOME/ditopt/costs`` (``~/.cache`` where that is not set); deleting them is always safe.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

import ditopt
from ditopt import files
from ditopt.errors import FileError
from ditopt.profiling.linear_costs import measure_linear_costs
from ditopt.profiling.linear_schema import LinearCost
from ditopt.profiling.schema import AttentionCost

if TYPE_CHECKING:
    import torch

    from ditopt.plan import Block, Hardware
    from ditopt.profiling.linear_costs import MeasureLinears
    from ditopt.profiling.schema import SiteShape

Table = TypeVar("Table", bound=BaseModel)


def cache_folder() -> Path:
    """Where tables are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ditopt" / "costs"


def attention_table(
    shape: SiteShape,
    block: Block,
    hardware: Hardware,
    measure: Callable[[], AttentionCost],
    *,
    again: bool = False,
) -> tuple[AttentionCost, bool]:
    """The table of one attention shape, and whether it was measured before.

    Args:
        shape: of the operands.
        block: sizes of the executor's blocks.
        hardware: of this machine.
        measure: makes the table where none is kept.
        again: measure whatever is kept.
    """
    facts = {"block": block.model_dump(), "shape": shape.model_dump()}
    return _kept("attention", facts, hardware, AttentionCost, measure, again)


def kept_linear_costs(hardware: Hardware, *, again: bool = False) -> MeasureLinears:
    """`measure_linear_costs` that measures a shape once per machine."""

    def measure(
        shapes: Sequence[tuple[int, int, int]],
        formats: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[LinearCost, ...]:
        found = []
        for shape in shapes:
            facts = {"shape": shape, "formats": sorted(formats), "dtype": str(dtype)}
            one = partial(_one_shape, shape, formats, device, dtype)
            found.append(_kept("linear", facts, hardware, LinearCost, one, again)[0])
        return tuple(found)

    return measure


def _one_shape(
    shape: tuple[int, int, int], formats: Sequence[str], device: torch.device, dtype: torch.dtype
) -> LinearCost:
    return measure_linear_costs([shape], formats, device, dtype)[0]


def _kept(
    kind: str,
    facts: dict[str, Any],
    hardware: Hardware,
    schema: type[Table],
    measure: Callable[[], Table],
    again: bool,
) -> tuple[Table, bool]:
    """A table that is kept or made; one that cannot be read is made anew, and kept if possible."""
    whole = {
        **facts,
        "estimate": "least",  # tables of earlier versions hold medians
        "ditopt": ditopt.__version__,
        "hardware": hardware.model_dump(),
        "fields": sorted(schema.model_fields),
    }
    key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / f"{kind}-{key}.json"
    if not again and path.is_file():
        try:
            return schema.model_validate_json(files.read_text(path)), True
        except (ValidationError, FileError):
            pass  # damaged: the measurement below replaces it
    table = measure()
    try:
        files.make_folder(path.parent)
        files.write_json(path, table.model_dump(mode="json"))
    except FileError:
        pass  # a read-only home: the next profile measures again
    return table, False

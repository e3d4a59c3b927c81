"""Measured tables of operators, kept for the next profile on the same machine.

A table belongs to the device's name, PyTorch, ditopt, the number of threads, the block sizes and
the operands' shape; another of any of them is measured anew. Tables are JSON files in
``$XDG_CACHE_HOME/ditopt/costs`` (``~/.cache`` where that is not set); deleting them is always safe.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

import ditopt
from ditopt import files
from ditopt.errors import FileError
from ditopt.profiling.schema import AttentionCost

if TYPE_CHECKING:
    from ditopt.plan import Block, Hardware
    from ditopt.profiling.schema import SiteShape


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

    A table that cannot be read is measured anew; one that cannot be kept is used all the same.
    """
    path = cache_folder() / f"attention-{_key(shape, block, hardware)}.json"
    if not again and path.is_file():
        try:
            return AttentionCost.model_validate_json(files.read_text(path)), True
        except (ValidationError, FileError):
            pass  # of another version, or damaged: the measurement below replaces it
    table = measure()
    try:
        files.make_folder(path.parent)
        files.write_json(path, table.model_dump(mode="json"))
    except FileError:
        pass  # a read-only home: the next profile measures again
    return table, False


def _key(shape: SiteShape, block: Block, hardware: Hardware) -> str:
    facts = {
        "ditopt": ditopt.__version__,
        "hardware": hardware.model_dump(),
        "block": block.model_dump(),
        "shape": shape.model_dump(),
        "fields": sorted(AttentionCost.model_fields),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]

"""Where a compiled program keeps its barriers, and where other things in shared memory.

Memory of a barrier that is not used any more must not hold anything else: see `gluon_produce`.
"""

from __future__ import annotations

import re
from typing import Any


def addresses(ptx: str) -> tuple[set[int], set[int]]:
    """Constant addresses that barriers are made at, and those that are stored to or loaded from."""
    at = {name: int(start) for name, start in re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx)}
    names = re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", ptx)
    plain = r"(?:st|ld)\.shared\.\w+\s+(?:%r\d+, )?\[\s*"
    others = {at[name] for name in re.findall(plain + r"(%r\d+)", ptx) if name in at}
    others |= {int(start) for start in re.findall(plain + r"global_smem\+(\d+)", ptx)}
    return {at.get(name, 0) for name in names}, others


def keep_their_memory(program: Any) -> None:
    """Fails where something else lies in a barrier's memory, or where none was found to compare."""
    barriers, others = addresses(program.asm["ptx"])
    assert len(barriers) >= 8
    assert len(others) >= 2  # a tile's number, and the next one's as the counter gave it
    assert not barriers & others

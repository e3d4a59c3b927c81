"""Where a compiled program keeps its barriers, and where other things in shared memory.

Memory of a barrier that is not used any more must not hold anything else: see `gluon_produce`.
"""

from __future__ import annotations

import re

BARRIER_BYTES = 8
_ACCESS = re.compile(
    r"(?:st|ld)\.shared(?:\.v(\d))?\.[bufs](\d+)\s+(?:%\w+, |\{[^}]*\}, )?"
    r"\[\s*(%r\d+|global_smem)\s*(?:\+\s*(\d+))?\s*\]"
)


def addresses(ptx: str) -> tuple[list[int], set[int]]:
    """Where barriers are made, and every byte that is stored or loaded at a constant address."""
    at = {name: int(start) for name, start in re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx)}
    at["global_smem"] = 0
    names = re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", ptx)
    touched: set[int] = set()
    for vector, bits, base, offset in _ACCESS.findall(ptx):
        if base in at:
            first = at[base] + int(offset or 0)
            touched |= set(range(first, first + int(vector or 1) * int(bits) // 8))
    return [at[name] for name in names], touched


def keep_their_memory(ptx: str, expected: int) -> None:
    """Fails where other things lie in a barrier's memory, or where not all barriers were found."""
    barriers, touched = addresses(ptx)
    assert len(barriers) == expected
    assert len(set(barriers)) == expected
    assert len(touched) >= 8  # a tile's number, and the next one's as the counter gave it
    for start in barriers:
        assert not touched & set(range(start, start + BARRIER_BYTES)), start

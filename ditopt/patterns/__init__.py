"""Static attention patterns of heads, and the block lists that execute them.

Every pattern is a set of (query, key) token pairs, rounded up to blocks: a block is kept if the set
holds any of its pairs, and a kept block is kept whole. Text tokens are kept as keys of every query
and, as queries, attend to everything; `skip` alone keeps nothing at all.
"""

from ditopt.patterns.blocks import block_lists, block_mask, density
from ditopt.patterns.candidates import candidates
from ditopt.patterns.kinds import (
    Band,
    Circle,
    Dense,
    FrameTile,
    GridPattern,
    HeadPattern,
    MultiDiagonal,
    Periodic,
    Radial,
    Skip,
    Stripe,
    Unit,
    Window,
)
from ditopt.patterns.selectors import (
    Hierarchical,
    PooledThreshold,
    PooledTopK,
    PooledTopP,
    Selector,
)

__all__ = [
    "Band",
    "Circle",
    "Dense",
    "FrameTile",
    "GridPattern",
    "HeadPattern",
    "Hierarchical",
    "MultiDiagonal",
    "Periodic",
    "PooledThreshold",
    "PooledTopK",
    "PooledTopP",
    "Radial",
    "Selector",
    "Skip",
    "Stripe",
    "Unit",
    "Window",
    "block_lists",
    "block_mask",
    "candidates",
    "density",
]

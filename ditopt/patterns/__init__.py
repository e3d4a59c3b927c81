"""Static attention patterns of heads, and the block lists that execute them.

Every pattern is a set of (query, key) token pairs, rounded up to blocks: a block is kept if the set
holds any of its pairs, and a kept block is kept whole. Text tokens are kept as keys of every query
and, as queries, attend to everything; `skip` alone keeps nothing at all.
"""

from ditopt.patterns.blocks import block_lists, block_mask, density
from ditopt.patterns.candidates import candidates, orders
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
    BlockSelector,
    Clusters,
    ExactTopK,
    ExactTopP,
    Hierarchical,
    OrderSelector,
    PooledPercentile,
    PooledThreshold,
    PooledTopK,
    PooledTopP,
    Selector,
    TwoMasks,
)

__all__ = [
    "Band",
    "BlockSelector",
    "Circle",
    "Clusters",
    "Dense",
    "ExactTopK",
    "ExactTopP",
    "FrameTile",
    "GridPattern",
    "HeadPattern",
    "Hierarchical",
    "MultiDiagonal",
    "OrderSelector",
    "Periodic",
    "PooledPercentile",
    "PooledThreshold",
    "PooledTopK",
    "PooledTopP",
    "Radial",
    "Selector",
    "Skip",
    "Stripe",
    "TwoMasks",
    "Unit",
    "Window",
    "block_lists",
    "block_mask",
    "candidates",
    "density",
    "orders",
]

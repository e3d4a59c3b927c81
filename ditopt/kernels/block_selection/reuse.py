"""Block lists that are chosen anew every few computed steps and used as they are in between.

Which blocks matter changes slowly over the steps of a denoising loop (AdaSpa, arXiv 2502.21079;
LiteAttention, arXiv 2511.11062), so a choice serves several. Steps that a cache skips never reach
an attention and so do not age a choice: a step is counted when it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

Lists = tuple[Tensor, Tensor]


class IndexReuse:
    """Keeps lists by key, such as (site, guidance branch, shape), for one denoising run.

    Attributes:
        every: computed steps that one choice serves; 1 chooses at each.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"every: must be positive, got {every}")
        self.every = every
        self._kept: dict[Hashable, tuple[int, Lists]] = {}

    def lists(self, key: Hashable, choose: Callable[[], Lists]) -> Lists:
        """The lists of a step that is computed now; `choose` makes them where none are young."""
        age, lists = self._kept.get(key, (self.every, None))
        if lists is None or age >= self.every:
            age, lists = 0, choose()
        self._kept[key] = (age + 1, lists)
        return lists

    def reset(self) -> None:
        """Forget everything: another run begins."""
        self._kept.clear()

"""What selectors keep from step to step: lists that serve several, centroids to start from.

Which blocks matter changes slowly over the steps of a denoising loop (AdaSpa, arXiv 2502.21079;
LiteAttention, arXiv 2511.11062), so a choice serves several. Steps that a cache skips never reach
an attention and so do not age a choice: a step is counted when it is computed.

The step runtime owns one `Kept` for each guidance branch of a sampling run and makes it the active
one around the programs of a call; a selector operator asks for it by `active`. Outside of any run
nothing is kept and every call chooses. All of this is on the host: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

Lists = tuple[Tensor, Tensor]


class Kept:
    """Lists and other state by key, such as (site, shape), for one branch of one denoising run."""

    def __init__(self) -> None:
        self._lists: dict[Hashable, tuple[int, Lists]] = {}
        self._values: dict[Hashable, Any] = {}

    def lists(self, key: Hashable, every: int, choose: Callable[[], Lists]) -> Lists:
        """The lists of a step that is computed now.

        Args:
            key: whose lists.
            every: computed steps that one choice serves; 1 chooses at each.
            choose: makes them where none are young.
        """
        if every < 1:
            raise ValueError(f"every: must be positive, got {every}")
        age, lists = self._lists.get(key, (every, None))
        if lists is None or age >= every:
            age, lists = 0, choose()
        self._lists[key] = (age + 1, lists)
        return lists

    def recall(self, key: Hashable) -> Any:
        """What `remember` was last told for a key; None for nothing."""
        return self._values.get(key)

    def remember(self, key: Hashable, value: Any) -> None:
        """Keep a value until the next one, or until the run ends."""
        self._values[key] = value

    def clear(self) -> None:
        """Forget everything."""
        self._lists.clear()
        self._values.clear()


_active: ContextVar[Kept | None] = ContextVar("ditopt_kept_lists", default=None)


def active() -> Kept | None:
    """What the running call may use from earlier steps of its branch; None where there is none."""
    return _active.get()


@contextmanager
def keeping(kept: Kept | None) -> Iterator[None]:
    """Make `kept` the active one."""
    token = _active.set(kept)
    try:
        yield
    finally:
        _active.reset(token)

"""What a cached `SmallDiT` must return, computed without ditopt."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ditopt.plan import Cache

from .small_dit import CACHE, SmallDiT


class Oracle:
    """Runs the blocks at the calls that a plan wants in full, and forecasts them at the others.

    Every (request, branch) has residuals of its own.
    """

    def __init__(self, model: SmallDiT, cache: Cache = CACHE) -> None:
        self.model, self.cache = model, cache
        self.stored: dict[Hashable, dict[int, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, key: Hashable, call: int, **given: Any) -> Tensor:
        """The result of a call of the run `key`, with the arguments of the model."""
        model, seen = self.model, list[Tensor]()
        if call in self.cache.full:
            hooks = [
                model.blocks[0].register_forward_pre_hook(lambda _, a: seen.append(a[0])),
                model.blocks[-1].register_forward_hook(lambda _, a, out: seen.append(out)),
            ]
            result = model(**given)
            for hook in hooks:
                hook.remove()
            before, after = seen
            self.stored.setdefault(key, {})[call] = after - before
            return result
        newest = sorted((c for c in self.stored[key] if c < call), reverse=True)
        row = zip(self.cache.coefficients[call], newest, strict=False)
        forecast = sum(c * self.stored[key][source].double() for c, source in row)
        if given.get("residuals") is not None:
            forecast = forecast + given["residuals"][-1]  # it is added behind the last block
        blocks = model.blocks
        try:
            model.blocks = torch.nn.ModuleList()
            hook = model.out.register_forward_pre_hook(lambda _, a: ((a[0] + forecast).to(a[0]),))
            return model(**given)
        finally:
            hook.remove()
            model.blocks = blocks

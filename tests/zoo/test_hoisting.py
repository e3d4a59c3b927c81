"""Published architectures: what depends on the prompt or timestep alone runs once."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from ditopt.backends.eager import EagerBackend

from .models import build, first_tensor, kwargs_for

aten = torch.ops.aten


class Products(TorchDispatchMode):
    """Counts matrix products by their weight's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.addmm.default, aten.mm.default):
            self.runs[args[-1].untyped_storage().data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "projections"), [("wan", "attn2.to_[kv]"), ("pixart", "attn2.to_[kv]")]
)
def test_cross_attention_projects_the_prompt_once_per_request(
    name: str, projections: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = Products()

    def lower(self: EagerBackend, gm: fx.GraphModule, options: Any) -> Any:
        def run(*arguments: Any) -> Any:
            with products:
                return gm(*arguments)

        return run

    monkeypatch.setattr(EagerBackend, "lower", lower)
    model, _ = build(name)
    watched = {
        parameter.untyped_storage().data_ptr(): path
        for path, parameter in model.named_parameters()
        if re.search(projections + r"\.weight$", path)
    }
    blocks = len(watched) // 2
    assert blocks >= 2
    torch.compiler.reset()
    compiled = torch.compile(
        model, backend="ditopt_eager", options={"fuse_projections": False}, fullgraph=True
    )
    for request in (1, 2):
        prompt = kwargs_for(name, seed=request)
        products.runs.clear()
        for step in range(5):
            now = kwargs_for(name, t=900.0 - 100 * step, seed=10 * request + step)
            arguments = {**prompt, **{k: now[k] for k in ("hidden_states", "timestep")}}
            with torch.no_grad():
                result = first_tensor(compiled(**arguments))
                assert torch.equal(result, first_tensor(model(**arguments)))
        counted = {path: products.runs[address] for address, path in watched.items()}
        assert counted == dict.fromkeys(watched.values(), 1)

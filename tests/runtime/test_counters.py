from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from ditopt.runtime import Artifact, StepSchedule, count, invalidate, stats


def test_stats_merges_what_shares_a_parameter() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    first, second, third = Artifact([model.weight]), Artifact([model.bias]), Artifact([other.bias])
    first.counters.ran(skipped=False)
    second.counters.ran(skipped=True)
    first.counters.ran(skipped=False, gated=True)
    second.counters.ran(skipped=True, gated=False)
    third.counters.ran(skipped=False, doubt="restarted")
    assert stats(model) == {
        "calls": 4,
        "full_steps": 2,
        "skipped_steps": 2,
        "gated_steps": 2,
        "overridden_steps": 1,
        "doubts": {},
        "kernels": {},
        "compiled": 2,
    }
    assert stats(torch.compile(model)) == stats(model)
    both = stats({"high": model, "low": other})
    assert (both["calls"], both["compiled"], both["doubts"]) == (5, 3, {"restarted": 1})


def test_artifacts_vanish_with_their_callable() -> None:
    model = torch.nn.Linear(2, 2)
    artifact = Artifact(model.parameters())
    assert stats(model)["compiled"] == 1
    del artifact
    gc.collect()
    assert stats(model)["compiled"] == 0


def test_invalidate_reaches_the_models_own_artifacts_only() -> None:
    model, other, called = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), []
    artifacts = [Artifact([model.weight]), Artifact([other.weight])]
    for artifact, name in zip(artifacts, ("model", "other"), strict=True):
        artifact.on_invalidate(lambda name=name: called.append(name))
    invalidate(model)
    assert called == ["model"]


def test_kernels_count_for_the_running_callable(make_fake: Callable[..., Any]) -> None:
    schedule = StepSchedule.build(2, [0], {1: [1.0]}, timesteps=[2.0, 1.0])
    fake, text = make_fake(schedule), torch.ones(1)
    body = fake.runtime.programs.body

    def counted(*arguments: Any) -> Any:
        count("block_sparse_attention")
        return body(*arguments)

    object.__setattr__(fake.runtime.programs, "body", counted)
    for t in (2.0, 1.0):
        fake(torch.zeros(1, 2), t, text)
    count("block_sparse_attention")  # nothing compiled runs: counted for nobody
    module = torch.nn.Module()
    module.weight = fake.weight
    assert stats(module)["kernels"] == {"block_sparse_attention": 1}
    assert stats(module)["skipped_steps"] == 1

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ditopt.runtime import Artifact, Skips, StepSchedule, count, counters, invalidate, stats


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


def test_skips_are_seen_call_by_call_in_artifacts_made_later_too() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    first, foreign = Artifact([model.weight]), Artifact([other.weight])
    first.counters.ran(skipped=True)  # before anybody asks
    skips = Skips(model)
    seen = []
    for skipped in (False, True, True, False):
        first.counters.ran(skipped=skipped)
        foreign.counters.ran(skipped=not skipped)
        seen.append(skips.any_since())
    second = Artifact()
    for skipped in (True, False, True):
        if skipped:
            second.own([model.bias])  # learnt by its first call
        second.counters.ran(skipped=skipped)
        seen.append(skips.any_since())
    first.counters.ran(skipped=True)
    seen.append(skips.any_since())
    assert seen == [False, True, True, False, True, False, True, True]
    assert not skips.any_since()


def test_known_artifacts_are_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    artifact = Artifact([model.weight])
    skips = Skips(model)
    monkeypatch.setattr(counters, "_artifacts_of", pytest.fail)
    artifact.counters.ran(skipped=True)
    assert skips.any_since()


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

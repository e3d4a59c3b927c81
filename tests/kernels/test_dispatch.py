"""The choice of executor: forecasts from a made-up table, reasons, dense heads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ditopt.kernels.block_sparse_attention import configs, dispatch, fa4
from ditopt.kernels.block_sparse_attention.dispatch import Site, choose, forecast, runs

NOTHING: dict[str, str] = {}


def cost(executor: str, **changes: Any) -> dict[str, Any]:
    base = {"block": [128, 128], "channels": 128, "processors": 100}
    return {**base, "executor": executor, "host": 10.0, "start": 5.0, "tile": 2.0} | changes


TABLE = (
    cost("gluon", host=80.0, entry=1.0),
    cost("flex", entry=1.5),
    cost("sdpa", host=5.0, entry=0.95),
    cost("gluon", channels=64, host=80.0, entry=0.7),
)
WITH_FA4 = (*TABLE, cost("fa4_dense", entry=0.9))


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"chip": TABLE}
    monkeypatch.setattr(dispatch, "costs_of", lambda device: costs.get(device, ()))


def site(n: int, *densities: float, channels: int = 128, block: int = 128) -> Site:
    return Site(1, n, n, channels, block, block, densities)


def test_a_forecast_counts_query_blocks_and_kept_blocks() -> None:
    one = site(1280, 0.5, 1.0)
    assert (one.rows, one.entries) == (20, 150.0)
    assert forecast("flex", one, "chip") == pytest.approx(max(10, 5 + (40 + 225) / 100) / 1e3)
    assert forecast("fa4", one, "chip") is None


def test_blocks_that_were_not_measured_cost_their_area() -> None:
    large, small = (forecast("flex", site(12800, 0.5, block=b), "chip") for b in (128, 64))
    assert large is not None
    assert small is not None
    assert small == pytest.approx(large + 2 * 100 / 100 / 1e3)  # equal areas, twice the rows


def test_the_closest_larger_head_size_is_taken() -> None:
    times = [forecast("gluon", site(65536, 0.5, channels=c), "chip") for c in (40, 64, 72, 128)]
    assert times[0] == times[1] != times[2] == times[3]


def test_long_sequences_and_short_ones_choose_differently() -> None:
    long, short = (
        choose(site(32768, 0.5, 0.5), "chip", NOTHING),
        choose(site(512, 0.5, 0.5), "chip", NOTHING),
    )
    assert (long.executor, short.executor) == ("gluon", "flex")
    assert long.reason.startswith("gluon: gluon 0.")
    assert "flex" in long.reason


def test_who_declines_is_never_chosen_and_says_why() -> None:
    choice = choose(site(32768, 0.5), "chip", {"gluon": "no such chip", "fa4": "not installed"})
    assert choice.executor == "flex"
    assert choice.reason.endswith("forecast. no such chip; not installed")
    declined = dict.fromkeys(dispatch.PREFERENCE, "not here")
    assert choose(site(512, 0.5), "chip", declined) == dispatch.Choice(
        "operator", "the operator itself: not here"
    )


def test_an_unknown_device_takes_the_order_of_preference() -> None:
    choice = choose(site(512, 0.5), "other", {"gluon": "no such chip"})
    assert choice == dispatch.Choice("fa4", "fa4: no costs were measured on other. no such chip")


def test_dense_attention_needs_no_lists_where_nothing_was_measured() -> None:
    choice = choose(site(512, 1.0, 1.0), "other", NOTHING)
    assert choice.executor == "sdpa"
    assert choice.reason == "sdpa, every head is dense: no costs were measured on other"


def test_a_cpu_has_as_many_processors_as_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "costs_of", lambda device: (cost("cpu", start=0.0, entry=1.0),))
    one = site(1280, 0.5)
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert forecast("cpu", one, "cpu") == pytest.approx((20 + 50) / threads / 1e3)


def test_recorded_costs_prefer_the_compiled_kernel_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "costs_of", configs.costs_of)
    choice = choose(site(2048, 0.25, 0.25, channels=64), "cpu", {"gluon": "no", "fa4": "no"})
    assert choice.executor == "cpu"
    assert "flex" in choice.reason
    mixed = choose(site(2048, 1.0, 0.25, channels=64), "cpu", {"gluon": "no", "fa4": "no"})
    assert (mixed.executor, mixed.dense_heads) == ("cpu", ())


def test_dense_heads_leave_where_that_is_faster() -> None:
    every = choose(site(32768, 1.0, 1.0), "chip", NOTHING)
    assert every.executor == "sdpa"
    assert every.reason.startswith("sdpa, every head is dense: sdpa")
    some = choose(site(32768, 1.0, 1.0, 0.1, 0.1), "chip", {"gluon": "no"})
    assert (some.executor, some.dense_heads) == ("flex", (0, 1))
    lists = choose(site(32768, 1.0, 1.0), "chip", {"sdpa": "the lists come from the data"})
    assert (lists.executor, lists.dense_heads) == ("gluon", ())


def test_flash_attention_4_takes_dense_attention_where_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "costs_of", lambda device: WITH_FA4)
    every = site(32768, 1.0, 1.0)
    assert choose(every, "chip", NOTHING).executor == "fa4_dense"
    assert choose(every, "chip", {"fa4": "not installed"}).executor == "sdpa"
    assert dispatch.choose_dense(every, "chip", {"fa4": "not installed"}) == (
        "sdpa",
        forecast("sdpa", every, "chip"),
    )


def test_dense_heads_stay_where_joining_costs_more() -> None:
    alternating = (1.0, 0.1) * 6
    choice = choose(site(1024, *alternating), "chip", {"gluon": "no"})
    assert (choice.executor, choice.dense_heads) == ("flex", ())


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_runs_cover_all_heads_in_order_and_alternate(dense: list[bool]) -> None:
    heads = [h for h, is_dense in enumerate(dense) if is_dense]
    found = runs(len(dense), heads)
    assert [h for first, end in found for h in range(first, end)] == list(range(len(dense)))
    kinds = [{dense[h] for h in range(first, end)} for first, end in found]
    assert all(len(kind) == 1 for kind in kinds)
    assert all(a != b for a, b in pairwise(kinds))


@given(st.floats(0, 1), st.floats(0, 1))
def test_forecasts_grow_with_density(a: float, b: float) -> None:
    low, high = sorted((a, b))
    times = [forecast("gluon", site(8192, density), "chip") for density in (low, high)]
    assert times[0] is not None
    assert times[1] is not None
    assert times[0] <= times[1]


def test_measured_tables_are_complete() -> None:
    tables = yaml.safe_load(configs.FILE.read_text())
    measured = [e for table in tables.values() for e in table.get("costs", ())]
    assert measured
    for entry in measured:
        assert set(entry) == set(cost("x", entry=1.0))
        assert entry["executor"] in (*dispatch.PREFERENCE, *dispatch.DENSE)
        assert min(entry[key] for key in ("host", "start", "tile", "entry")) >= 0
        assert entry["entry"] > 0


def test_reasons_on_a_cpu() -> None:
    declined = dispatch.reasons_to_decline(torch.zeros(1, 1, 8, 64), 128, 128)
    assert {"gluon", "fa4", "triton"} <= set(declined) <= {"gluon", "fa4", "triton", "cpu"}
    assert declined["fa4"] == "FlashAttention-4 needs q on a CUDA device, got cpu"
    assert "float64" in dispatch.reasons_to_decline(torch.zeros(1, 1, 8, 64).double(), 8, 8)["flex"]


def test_flash_attention_4_keeps_the_layout_of_the_operator() -> None:
    q = torch.empty(2, 3, 256, 64, device="meta")
    lists = torch.empty(1, 3, 2, dtype=torch.int32, device="meta")
    ids = torch.empty(1, 3, 2, 2, dtype=torch.int32, device="meta")
    out = torch.ops.ditopt.block_sparse_attention_fa4(q, q, q, lists, ids, 128, 128, 0.1)
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()
    assert fa4.reason_to_decline(torch.zeros(1, 1, 1, 64), 128, 128) is not None

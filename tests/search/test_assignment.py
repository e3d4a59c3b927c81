"""The assignment against brute force: time, error, memory and the number of block programs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditopt.search import lagrangian
from ditopt.search.assignment import Assignment, Limits, evaluate, solve
from ditopt.search.sensitivity import Alternative, Site, families, program_count, untouched


def brute_force(sites: Sequence[Site], minimize: Any, limits: Limits) -> float:
    best, kinds = math.inf, families(sites)
    per_site = [
        [
            (number, options)
            for number, a in enumerate(site.alternatives)
            for options in itertools.product(range(len(a.option_ms)), repeat=site.heads)
        ]
        for site in sites
    ]
    for choice in itertools.product(*per_site):
        point = evaluate(sites, {s.id: c for s, c in zip(sites, choice, strict=True)})
        if limits.allow(kinds, point):
            best = min(best, point[minimize])
    return best


amount = st.floats(0, 10).map(lambda x: round(x, 3))


@st.composite
def problems(draw: st.DrawFn) -> list[Site]:
    """One or two blocks, each with an attention of one or two heads, some with a linear layer."""
    sites, blocks = [], draw(st.integers(1, 2))
    options, heads = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    with_linear = draw(st.booleans())
    start = draw(st.sampled_from([0, 2]))
    for block in range(blocks):
        error = np.array([[0.0, *(draw(amount) for _ in range(options - 1))] for _ in range(heads)])
        ms = np.array([draw(amount) for _ in range(options)])
        sparse = Alternative("drop", draw(amount), 0, ms, error, tuple(range(options)))
        dense = untouched(heads, draw(amount) + 0.1, name="dense")
        sites.append(Site(f"blocks.{block}.attn#0", "attention", start, (dense, sparse)))
        if with_linear:
            whole = draw(st.integers(10, 20))
            plain = untouched(1, draw(amount) + 0.1, whole, "plain")
            rounded = Alternative(
                "int8", draw(amount), whole // 2, np.zeros(1), np.array([[draw(amount)]]), (0,)
            )
            sites.append(Site(f"blocks.{block}.up", "linears", 0, (plain, rounded)))
    return sites


@settings(max_examples=80, deadline=None)
@given(
    problems(),
    st.floats(0, 20),
    st.sampled_from(["ms", "error"]),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([math.inf, 30, 20, 12]),
)
def test_assignment_equals_brute_force(
    sites: list[Site], budget: float, minimize: Any, programs: int | None, size: float
) -> None:
    limits = Limits(bytes=size, programs=programs, **{_other(minimize): budget})
    expected = brute_force(sites, minimize, limits)
    found = solve(sites, minimize, limits)
    if math.isinf(expected):
        assert found is None
        return
    assert found is not None
    assert limits.allow(families(sites), found)
    assert found[minimize] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def _other(minimize: str) -> str:
    return "error" if minimize == "ms" else "ms"


def stack(layers: int, heads: int, options: int, seed: int = 0) -> list[Site]:
    """Layers of different difficulty, each with attention and one linear layer."""
    rng = np.random.default_rng(seed)
    kept = np.linspace(1, 0, options)
    sites = []
    for layer in range(layers):
        error = (1 - kept) ** 2 * rng.uniform(0.1, 9, (heads, 1))
        alternatives = (
            untouched(heads, 20.0, name="dense"),
            Alternative("drop", 1.0, 0, kept * 20 / heads, error, tuple(range(options))),
            Alternative("mean", 3.0, 0, kept * 20 / heads, error / 5, tuple(range(options))),
        )
        sites.append(Site(f"blocks.{layer}.attn#0", "attention", 2, alternatives))
        layers_error = np.array([[rng.uniform(0.01, 5)]])
        rounded = Alternative("int8", 2.0, 50, np.zeros(1), layers_error, (0,))
        plain = untouched(1, 4.0, 100, "plain")
        sites.append(Site(f"blocks.{layer}.up", "linears", 0, (plain, rounded)))
    return sites


@pytest.mark.parametrize("budget", [5.0, 20.0, 60.0])
def test_the_frontier_is_close_to_the_optimum(budget: float) -> None:
    sites, limits = stack(5, 4, 8), Limits(error=budget)
    alone = lagrangian.solve(sites, families(sites), "ms", limits).best
    exact = solve(sites, "ms", limits)
    assert alone is not None
    assert exact is not None
    assert exact.ms <= alone.ms <= 1.05 * exact.ms
    assert exact.error <= budget


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6])
def test_programs_are_bounded_and_each_one_more_helps(most: int) -> None:
    sites = stack(6, 4, 8)
    kinds = families(sites)

    def at(programs: int | None) -> Assignment:
        found = solve(sites, "ms", Limits(error=25.0, programs=programs))
        assert found is not None
        return found

    found = at(most)
    assert program_count(kinds, found.choices) <= most
    assert at(None).ms <= found.ms + 1e-9
    if most > 1:
        assert found.ms <= at(most - 1).ms + 1e-9


def test_a_dense_start_is_a_program_of_its_own() -> None:
    sites = stack(3, 2, 4)
    kinds = families(sites)
    assert program_count(kinds, {}) == 1
    one = {"blocks.0.attn#0": (1, (1, 1))}
    assert program_count(kinds, one) == 2
    everywhere = {f"blocks.{b}.attn#0": (1, (b, b)) for b in range(3)}
    assert program_count(kinds, everywhere) == 2  # options are data
    everywhere["blocks.1.up"] = (1, (0,))
    assert program_count(kinds, everywhere) == 4  # plain and int8, before and after the start


def test_kinds_of_blocks_are_counted_apart() -> None:
    sites = stack(2, 2, 4)
    other = [Site(s.id.replace("blocks", "single"), *_rest(s)) for s in stack(2, 2, 4)]
    assert len(families([*sites, *other])) == 2
    found = solve([*sites, *other], "ms", Limits(error=1e9, programs=1))
    assert found is not None  # one each, although one was asked for
    assert program_count(families([*sites, *other]), found.choices) == 2


def _rest(site: Site) -> tuple[Any, ...]:
    return site.technique, site.first_call, site.alternatives


def test_memory_is_kept() -> None:
    sites = stack(6, 4, 8)
    found = solve(sites, "error", Limits(bytes=460, programs=1))
    assert found is not None
    assert found.bytes <= 460
    rounded = sum(choice[0] for site, choice in found.choices.items() if site.endswith("up"))
    assert rounded == 6  # with one program they can only all be rounded
    assert solve(sites, "error", Limits(bytes=299)) is None
    some = solve(sites, "error", Limits(bytes=460))
    assert some is not None
    assert sum(1 for site in some.choices if site.endswith("up")) == 3

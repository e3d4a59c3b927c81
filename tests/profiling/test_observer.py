"""What the observer keeps: sums over branches, sketches within the memory allowed, reasons."""

from dataclasses import dataclass

import pytest
import torch

from ditopt.errors import ProfileError
from ditopt.layout import TokenLayout
from ditopt.patterns import Dense, Skip
from ditopt.plan import Block
from ditopt.profiling.observer import ProfileObserver

CALLS = 4


@dataclass(frozen=True)
class Site:
    id: str = "a#0"
    kind: str = "self"
    heads: int = 2
    head_dim: int = 8
    mask: str = "none"


def make(
    layout: TokenLayout | None = None, branches: int = 1, memory_bytes: int = 1 << 20
) -> ProfileObserver:
    block = Block(q=8, k=8)
    return ProfileObserver(layout, block, CALLS, [0, 3], branches, memory_bytes)


def show(
    observer: ProfileObserver, site: Site, tokens: int = 32, keys: int = 32, key_heads: int = 2
) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, tokens, 8), torch.randn(1, key_heads, keys, 8)
    observer.attention(site, q, k, k, None, None)


def test_branches_add_up() -> None:
    def run(branches: int) -> dict[str, torch.Tensor]:
        observer = make(TokenLayout(2, 4, 4), branches)
        for call in range(CALLS):
            for branch in range(branches):
                observer.begin_call(call, branch)
                show(observer, Site())
                observer.stack((torch.zeros(1, 32, 4),), (torch.full((1, 32, 4), 1.0 + call),))
        record = observer.finish_seed(torch.ones(CALLS))
        return {"gram": record.gram, "error": record.squared_error["a#0"]}

    one, two = run(1), run(2)
    torch.testing.assert_close(two["gram"], 2 * one["gram"])
    torch.testing.assert_close(two["error"], 2 * one["error"])
    assert one["error"].shape[:2] == (2, 2)


def test_residuals_are_sketched_where_memory_is_short() -> None:
    values = torch.randn(CALLS, 4096)
    grams = []
    for memory_bytes in (1 << 20, 1 << 15):
        observer = make(memory_bytes=memory_bytes)
        for call in range(CALLS):
            observer.begin_call(call, 0)
            observer.stack((None,), (values[call],))
        grams.append(observer.finish_seed(torch.ones(CALLS)).gram)
    exact, sketched = grams
    torch.testing.assert_close(exact, (values.double() @ values.double().T))
    assert not torch.equal(exact, sketched)
    torch.testing.assert_close(sketched.diagonal(), exact.diagonal(), rtol=0.3, atol=0)


def test_a_branch_that_misses_calls_is_refused() -> None:
    observer = make()
    observer.begin_call(0, 0)
    observer.stack((None,), (torch.ones(4),))
    with pytest.raises(ProfileError, match="no residual was recorded for calls"):
        observer.finish_seed(torch.ones(CALLS))


@pytest.mark.parametrize(
    ("site", "shape", "reason"),
    [
        (Site(kind="cross"), {}, "different sequences"),
        (Site(), {"keys": 40}, "different sequences"),
        (Site(), {"key_heads": 1}, "2 query heads share 1 key heads"),
        (Site(mask="key_padding"), {}, "it has a mask"),
        (Site(), {"tokens": 16, "keys": 16}, "does not hold a grid"),
    ],
)
def test_sites_that_cannot_take_patterns_say_why(
    site: Site, shape: dict[str, int], reason: str
) -> None:
    observer = make(TokenLayout(2, 4, 4))
    show(observer, site, **shape)
    assert list(observer.sites) == [site.id]
    assert reason in observer.left_dense[site.id]
    assert not observer.shapes


def test_an_inferred_layout_serves_where_none_is_stated() -> None:
    observer = make()
    observer.suggest_layout(TokenLayout(2, 4, 4))
    show(observer, Site())
    assert len(observer.options) > 2
    stated = make(TokenLayout(1, 4, 8))
    stated.suggest_layout(TokenLayout(2, 4, 4))
    assert stated.layout == TokenLayout(1, 4, 8)


def test_without_a_layout_only_the_ends_are_candidates() -> None:
    observer = make()
    show(observer, Site())
    assert [(o.pattern, o.remainder) for o in observer.options] == [
        (Dense(), "drop"),
        (Skip(), "drop"),
        (Skip(), "mean"),
    ]

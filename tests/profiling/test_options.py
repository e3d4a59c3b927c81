"""Options: their places in a profile's tensors, orders of tokens, blocks chosen from data."""

import pytest
import torch

from ditopt.kernels.block_selection.reference import select_pooled
from ditopt.kernels.block_sparse_attention.lists import to_blocks
from ditopt.layout import TokenLayout
from ditopt.patterns import Dense, Skip, block_mask, density, orders
from ditopt.plan import Block
from ditopt.profiling.candidates import candidate_errors
from ditopt.profiling.options import SELECTORS, OptionSet, selected_blocks
from ditopt.token_order import Tile, TokenMajor

LAYOUT, BLOCK = TokenLayout(4, 8, 16), Block(q=32, k=32)


@pytest.mark.parametrize(
    ("layout", "block", "expected"),
    [
        (TokenLayout(8, 16, 16), 64, (Tile(frames=2, rows=4, cols=8), TokenMajor())),
        (TokenLayout(21, 30, 52), 128, (Tile(frames=2, rows=8, cols=8), TokenMajor())),
        (TokenLayout(1, 64, 64), 64, (Tile(frames=1, rows=8, cols=8),)),
        (TokenLayout(1, 64, 8), 64, ()),
        (TokenLayout(300, 2, 2), 64, ()),
        (TokenLayout(8, 16, 4), 64, (Tile(frames=2, rows=8, cols=4), TokenMajor())),
        (None, 64, ()),
    ],
)
def test_orders_follow_the_grid(
    layout: TokenLayout | None, block: int, expected: tuple[object, ...]
) -> None:
    assert orders(layout, block) == (None, *expected)


def test_places_are_those_of_the_options() -> None:
    choices = OptionSet.of(LAYOUT, LAYOUT.total, BLOCK)
    options = choices.options
    assert options[0].pattern == Dense()
    assert len(set(options)) == len(options)
    for order, patterns in enumerate(choices.patterns):
        for place, remainder in zip(choices.places(order), ("drop", "mean"), strict=True):
            assert [o.pattern for o in options[place]] == list(patterns)
            assert {(o.order, o.remainder) for o in options[place]} == {(order, remainder)}


def test_another_order_is_measured_where_it_spares_blocks() -> None:
    choices = OptionSet.of(LAYOUT, LAYOUT.total, BLOCK)
    sizes = (LAYOUT, LAYOUT.total, LAYOUT.total, BLOCK.q, BLOCK.k)
    assert len(choices.orders) == 3
    for order, patterns in list(zip(choices.orders, choices.patterns, strict=True))[1:]:
        assert 1 <= len(patterns) <= 6
        assert Skip() not in patterns
        for pattern in patterns:
            assert density(pattern, *sizes, order) <= 0.8 * density(pattern, *sizes)


def test_an_order_permutes_what_its_masks_keep() -> None:
    """Errors in another order are those of the same blocks' tokens in the model's own."""
    torch.manual_seed(0)
    layout = TokenLayout(2, 8, 8, text_after=5)
    q, k, v = torch.randn(3, 1, 2, layout.total, 8).unbind()
    choices = OptionSet.of(layout, layout.total, Block(q=16, k=16))
    order = choices.permutation(1, layout, layout.total)
    assert order is not None
    assert order.sort().values.tolist() == list(range(layout.total))
    assert order[-5:].tolist() == list(range(128, 133))
    masks = choices.masks(1, layout, layout.total, Block(q=16, k=16))
    found = candidate_errors(
        *(x[:, :, order] for x in (q, k, v)), masks, block_q=16, block_k=16, scale=1.0
    )
    pairs = masks[0].repeat_interleave(16, 0).repeat_interleave(16, 1)
    allowed = torch.zeros(layout.total, layout.total, dtype=torch.bool)
    allowed[order[:, None], order[None]] = pairs[: layout.total, : layout.total]
    scores = q.double() @ k.double().mT
    dense = scores.softmax(-1) @ v.double()
    sparse = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v.double()
    expected = (sparse - dense).square().sum((0, 2, 3))
    torch.testing.assert_close(found.squared_error[:, 0], expected, rtol=1e-4, atol=1e-9)


def test_selected_blocks_are_the_selector_s_own() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, LAYOUT.total, 8).unbind()
    found = selected_blocks(q, k, LAYOUT, BLOCK, 0.3)
    assert found.shape == (2, 3, len(SELECTORS), 16, 16)
    forced = block_mask(SELECTORS[0].keep, LAYOUT, LAYOUT.total, LAYOUT.total, 32, 32)
    for number, selector in enumerate(SELECTORS):
        lists = select_pooled(q, k, forced, 32, 32, "top_k", selector.density, 1, 0.3)
        assert torch.equal(found[:, :, number], to_blocks(*lists, 16))
    assert selected_blocks(q, k, None, BLOCK, 0.3).float().mean() == pytest.approx(
        sum(s.density for s in SELECTORS) / 3, abs=0.01
    )

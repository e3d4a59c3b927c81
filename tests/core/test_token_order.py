"""Orders of grid tokens: permutations, neighbourhoods, and lengths of ragged tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from ditopt.layout import TokenLayout
from ditopt.token_order import (
    Hilbert,
    Morton,
    Raster,
    Tile,
    TokenMajor,
    TokenOrder,
    inverse,
    permutation,
    sequence_permutation,
    tile_lengths,
)

sizes = st.integers(1, 7)
layouts = st.builds(TokenLayout, sizes, sizes, sizes, st.integers(0, 5), st.integers(0, 5))
orders = st.one_of(
    st.builds(Raster),
    st.builds(TokenMajor),
    st.builds(Tile, frames=sizes, rows=sizes, cols=sizes),
    st.builds(Morton, across_frames=st.booleans()),
    st.builds(Hilbert, across_frames=st.booleans()),
)


@settings(max_examples=100, deadline=None)
@given(orders, layouts)
def test_an_order_is_a_permutation_and_text_stays(order: TokenOrder, layout: TokenLayout) -> None:
    moved = sequence_permutation(order, layout)
    assert sorted(moved.tolist()) == list(range(layout.total))
    text = [*range(layout.text_before), *range(layout.total - layout.text_after, layout.total)]
    assert all(moved[k] == k for k in text)
    np.testing.assert_array_equal(moved[inverse(moved)], np.arange(layout.total))


@settings(max_examples=100, deadline=None)
@given(st.builds(Tile, frames=sizes, rows=sizes, cols=sizes), layouts)
def test_tiles_stand_together(order: Tile, layout: TokenLayout) -> None:
    lengths = tile_lengths(order, layout)
    assert lengths.sum() == layout.tokens
    shape = (layout.frames, layout.height, layout.width)
    t, h, w = np.unravel_index(permutation(order, layout), shape)
    for tile in np.split(np.stack([t, h, w]), np.cumsum(lengths)[:-1], axis=1):
        coordinates = tile // np.array([[order.frames], [order.rows], [order.cols]])
        assert (coordinates == coordinates[:, :1]).all()
        raster = np.ravel_multi_index(tuple(tile), shape)
        assert (np.diff(raster) > 0).all()


def test_token_major_follows_the_formula() -> None:
    layout = TokenLayout(3, 4, 5)
    places = inverse(permutation(TokenMajor(), layout))
    t, h, w = np.indices((3, 4, 5)).reshape(3, -1)
    np.testing.assert_array_equal(places, (h * 5 + w) * 3 + t)


@pytest.mark.parametrize("frames", [1, 8])
def test_hilberts_curve_goes_from_neighbour_to_neighbour(frames: int) -> None:
    order = permutation(Hilbert(), TokenLayout(frames, 8, 8))
    steps = np.abs(np.diff(np.stack(np.unravel_index(order, (frames, 8, 8))), axis=1)).sum(axis=0)
    assert steps.tolist() == [1] * (frames * 64 - 1)


def test_sixty_four_tokens_in_z_order_are_a_cube() -> None:
    order = permutation(Morton(), TokenLayout(8, 8, 8)).reshape(8, 64)
    for cube in order:
        for axis in np.unravel_index(cube, (8, 8, 8)):
            assert axis.max() - axis.min() == 3


def test_in_frame_orders_leave_frames_apart() -> None:
    for order in (Morton(across_frames=False), Hilbert(across_frames=False)):
        assert (np.diff(permutation(order, TokenLayout(3, 5, 6)) // 30) >= 0).all()


@settings(max_examples=25, deadline=None)
@given(orders, layouts)
def test_attention_in_any_order_is_attention_in_raster(
    order: TokenOrder, layout: TokenLayout
) -> None:
    moved = torch.from_numpy(sequence_permutation(order, layout))
    q, k, v = torch.randn(
        3, 1, 2, layout.total, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    dense = scaled_dot_product_attention(q, k, v)
    out = scaled_dot_product_attention(q[:, :, moved], k[:, :, moved], v[:, :, moved])
    back = out[:, :, torch.from_numpy(inverse(moved.numpy()))]
    torch.testing.assert_close(back, dense, rtol=0, atol=1e-12)


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Tile.model_validate({"rows": 8, "cols": 8, "depth": 2})

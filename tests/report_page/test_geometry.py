"""Blocks at the page's resolution, axes, sheets of frames: numbers that are easy to get wrong."""

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ditopt.errors import WorkloadError
from ditopt.layout import TokenLayout
from ditopt.patterns import Band, PooledTopK, Window, block_mask
from ditopt.profiling.maps import pack
from ditopt.report_page import pictures
from ditopt.report_page.blocks import encode, in_raster, merged, unpack
from ditopt.report_page.charts import axis
from ditopt.report_page.choices import in_words
from ditopt.report_page.maps import MAX_BYTES, affordable
from ditopt.report_page.pictures import sheets
from ditopt.token_order import Hilbert, Tile, TokenMajor, permutation

from .folders import write_profile


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), side=st.integers(1, 12))
def test_merging_keeps_all_of_the_mass(rows, columns, side):
    mass = np.random.default_rng(rows).random((2, rows, columns))
    means, wide = merged(mass, side)
    assert max(means.shape[1:]) <= side
    assert wide.sum() == columns
    high = np.diff([*range(0, rows, -(-rows // side)), rows])
    total = (means * wide * high[:, None]).sum(axis=(1, 2))
    np.testing.assert_allclose(total, mass.sum(axis=(1, 2)), rtol=1e-12)


def test_small_maps_are_not_merged():
    mass = np.arange(12.0).reshape(3, 4)
    means, wide = merged(mass, 4)
    np.testing.assert_array_equal(means, mass)
    assert wide.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("order", [TokenMajor(), Tile(frames=2, rows=2, cols=4), Hilbert()])
def test_blocks_of_an_order_in_the_raster_count_token_pairs(order):
    layout, block = TokenLayout(frames=3, height=5, width=6, text_after=7), 8
    pattern = Window(frames=1, rows=3, cols=3)
    kept = block_mask(pattern, layout, layout.total, layout.total, block, block, order).numpy()
    moved = np.arange(layout.total)
    moved[: layout.tokens] = permutation(order, layout)
    place = np.argsort(moved)  # where a token of the raster stands in the order
    pairs = kept[place[:, None] // block, place[None, :] // block].astype(float)
    expected = merged(pairs, -(-layout.total // block))[0]
    found = in_raster(kept.astype(float), layout, order, block, block)
    starts = np.arange(0, layout.total, block)
    counts = np.diff(np.append(starts, layout.total))
    expected = np.add.reduceat(np.add.reduceat(pairs, starts, 0), starts, 1)
    np.testing.assert_allclose(found, expected / np.outer(counts, counts), atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (8, 8), (7, 9)])
def test_packed_sets_are_read_back(rows, columns):
    blocks = torch.rand(2, 3, rows, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    np.testing.assert_array_equal(unpack(pack(blocks).numpy(), rows, columns), blocks.numpy())


def test_shares_become_bytes():
    assert base64.b64decode(encode(np.array([0.0, 0.5, 1.0]))) == bytes([0, 128, 255])


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8))
def test_an_axis_holds_its_values_and_has_ticks(values):
    found = axis(values, 10.0, 210.0, "")
    assert all(10 <= found.at(value) <= 210 for value in values)
    assert 2 <= len(found.ticks) <= 12
    assert all(10 - 0.01 <= place <= 210.01 for place, _ in found.labels())


def test_patterns_and_selectors_in_words():
    assert in_words(Window(frames=2, rows=3, cols=4)) == "frames 2, rows 3, cols 4"
    assert in_words(PooledTopK(density=0.25, keep=Band(window=9))) == (
        "minimum 1, keep band window 9, refresh 1, density 0.25"
    )


@pytest.mark.parametrize(("layers", "heads"), [(2, 2), (60, 40), (200, 64)])
def test_maps_fit_however_many_heads_there_are(layers, heads, tmp_path):
    profile = write_profile(tmp_path, layers=2, heads=2, maps=False)
    shape = next(iter(profile.shapes.values())).model_copy(
        update={"heads": heads, "tokens": 128 * 900}
    )
    shapes = {f"blocks.{n}.attn1#0": shape for n in range(layers)}
    detail = affordable(profile.model_copy(update={"shapes": shapes}))
    calls = len(profile.observed_calls) if detail.per_call else 1
    assert 2 * layers * heads * calls * detail.side**2 <= max(MAX_BYTES, 2 * layers * heads * 64)


def test_frames_of_any_size_fit():
    noise = np.random.default_rng(0).integers(0, 256, (20, 300, 400, 3), dtype=np.uint8)
    found = sheets(7, noise, noise)
    size = len(base64.b64decode(found.dense.partition(",")[2]))
    assert 2 * size <= pictures.MAX_BYTES
    assert found.reduced
    assert (found.numbers[0], found.numbers[-1], found.total) == (0, 19, 20)


def test_small_frames_are_kept_exactly():
    frames = np.random.default_rng(0).integers(0, 256, (3, 10, 14, 3), dtype=np.uint8)
    found = sheets(7, frames, 255 - frames)
    assert not found.reduced
    for address, expected in ((found.dense, frames), (found.optimized, 255 - frames)):
        png = base64.b64decode(address.removeprefix("data:image/png;base64,"))
        sheet = np.asarray(Image.open(io.BytesIO(png)))
        np.testing.assert_array_equal(sheet.reshape(frames.shape), expected)


@pytest.mark.parametrize(
    ("optimized", "message"),
    [
        (np.zeros((2, 4, 4, 3), dtype=np.float32), r"must give uint8 \[F, H, W, 3\]; got float32"),
        (np.zeros((3, 4, 4, 3), dtype=np.uint8), "differ in shape"),
    ],
)
def test_other_frames_are_refused(optimized, message):
    with pytest.raises(WorkloadError, match=message):
        sheets(0, np.zeros((2, 4, 4, 3), dtype=np.uint8), optimized)

"""Block masks against a token-level oracle that evaluates each definition pair by pair."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode

from ditopt.layout import TokenLayout
from ditopt.patterns import (
    Band,
    Circle,
    Dense,
    FrameTile,
    HeadPattern,
    MultiDiagonal,
    Periodic,
    Radial,
    Skip,
    Stripe,
    Window,
    block_lists,
    block_mask,
    blocks,
    candidates,
    density,
)
from ditopt.token_order import (
    Hilbert,
    Morton,
    Raster,
    Tile,
    TokenMajor,
    TokenOrder,
    sequence_permutation,
)


def token_mask(pattern: HeadPattern, layout: TokenLayout) -> np.ndarray:
    """The kept pairs [N, N], straight from the definitions."""
    n = layout.total
    if isinstance(pattern, Skip):
        return np.zeros((n, n), dtype=bool)
    position = np.arange(n) - layout.text_before
    is_text = (position < 0) | (position >= layout.tokens)
    q, k = position[:, None], position[None, :]
    frame = position // (layout.height * layout.width)
    row = position // layout.width % layout.height
    match pattern:
        case Dense():
            kept = np.ones((n, n), dtype=bool)
        case Band():
            kept = abs(q - k) <= pattern.window
        case MultiDiagonal():
            rows = 1 if pattern.period == "row" else layout.height
            away = abs(q - k) % (rows * layout.width)
            kept = np.minimum(away, rows * layout.width - away) <= pattern.width
        case Stripe():
            unit = frame if pattern.unit == "frame" else position // layout.width
            kept = (unit % pattern.every == 0)[None, :] | (
                abs(unit[:, None] - unit[None, :]) <= pattern.reach
            )
        case Window():
            kept = np.ones((n, n), dtype=bool)
            for x, size, length in (
                (frame, pattern.frames, layout.frames),
                (row, pattern.rows, layout.height),
                (position % layout.width, pattern.cols, layout.width),
            ):
                size = min(size, length)
                start = np.minimum(np.maximum(x - size // 2, 0), length - size)[:, None]
                kept &= (start <= x[None, :]) & (x[None, :] < start + size)
        case Circle():
            down = row[:, None] - row[None, :]
            right = (position % layout.width)[:, None] - (position % layout.width)[None, :]
            size = min(pattern.frames, layout.frames)
            start = np.minimum(np.maximum(frame - size // 2, 0), layout.frames - size)[:, None]
            kept = down**2 + right**2 < pattern.radius**2
            kept &= (start <= frame[None, :]) & (frame[None, :] < start + size)
        case FrameTile():
            count = min(pattern.references, layout.frames)
            references = [i * layout.frames // count for i in range(count)]
            kept = (frame[:, None] == frame[None, :]) | np.isin(frame, references)[None, :]
        case Periodic():
            dt = abs(abs(frame[:, None] - frame[None, :]) - pattern.frame_offset)
            dr = abs(abs(row[:, None] - row[None, :]) - pattern.row_offset)
            kept = (dt % pattern.frame_period <= pattern.frame_width - 1) & (
                dr % pattern.row_period <= pattern.row_width - 1
            )
        case Radial():
            kept = radial_mask(pattern, layout, position)
    return kept | is_text[:, None] | is_text[None, :]


def radial_mask(pattern: Radial, layout: TokenLayout, position: np.ndarray) -> np.ndarray:
    """Pair by pair, in Python's integers."""
    size = layout.height * layout.width
    kept = np.zeros((len(position), len(position)), dtype=bool)
    for a, q in enumerate(position.tolist()):
        for b, k in enumerate(position.tolist()):
            apart = abs(q // size - k // size)
            width = pattern.decay * size / 2 ** (max(apart, 1).bit_length() - 1)
            away = abs(q % size - k % size)
            if width >= 1:
                near = away + 1 <= width
            else:
                near = away == 0 and apart % math.ceil(1 / width) == 0
            kept[a, b] = near or apart <= 1 or k // size == 0
    return kept


def rounded_up(mask: np.ndarray, block_q: int, block_k: int) -> np.ndarray:
    pad = [(0, -mask.shape[0] % block_q), (0, -mask.shape[1] % block_k)]
    padded = np.pad(mask, pad)
    blocks = padded.reshape(padded.shape[0] // block_q, block_q, -1, block_k)
    return blocks.any(axis=(1, 3))


sizes = st.integers(1, 6)
layouts = st.builds(TokenLayout, sizes, sizes, sizes, st.integers(0, 9), st.integers(0, 9))
units = st.sampled_from(["frame", "row"])
patterns = st.one_of(
    st.builds(Dense),
    st.builds(Skip),
    st.builds(Band, window=st.integers(0, 60)),
    st.builds(MultiDiagonal, period=units, width=st.integers(0, 12)),
    st.builds(Stripe, unit=units, every=st.integers(1, 8), reach=st.integers(0, 3)),
    st.builds(Window, frames=sizes, rows=sizes, cols=sizes),
    st.builds(Circle, radius=sizes, frames=sizes),
    st.builds(FrameTile, references=sizes),
    st.builds(
        Periodic,
        frame_width=sizes, frame_offset=st.integers(0, 5), frame_period=sizes,
        row_width=sizes, row_offset=st.integers(0, 5), row_period=sizes,
    ),
    st.builds(Radial, decay=st.sampled_from([0.02, 0.1, 0.3, 1.0, 2.5])),
)  # fmt: skip
orders = st.sampled_from(
    [Raster(), TokenMajor(), Tile(frames=2, rows=3, cols=2), Morton(), Hilbert(across_frames=False)]
)


@settings(max_examples=150, deadline=None)
@given(patterns, layouts, st.integers(1, 40), st.integers(1, 40))
def test_masks_are_the_token_sets_rounded_up(
    pattern: HeadPattern, layout: TokenLayout, block_q: int, block_k: int
) -> None:
    n = layout.total
    expected = rounded_up(token_mask(pattern, layout), block_q, block_k)
    actual = block_mask(pattern, layout, n, n, block_q, block_k)
    assert actual.dtype == torch.bool
    np.testing.assert_array_equal(actual.numpy(), expected)
    assert density(pattern, layout, n, n, block_q, block_k) == pytest.approx(expected.mean())


@settings(max_examples=100, deadline=None)
@given(patterns, layouts, orders, st.integers(1, 40), st.integers(1, 40))
def test_masks_in_another_order_are_the_permuted_token_sets(
    pattern: HeadPattern, layout: TokenLayout, order: TokenOrder, block_q: int, block_k: int
) -> None:
    n = layout.total
    moved = sequence_permutation(order, layout)
    expected = rounded_up(token_mask(pattern, layout)[np.ix_(moved, moved)], block_q, block_k)
    actual = block_mask(pattern, layout, n, n, block_q, block_k, order)
    np.testing.assert_array_equal(actual.numpy(), expected)


def test_masks_of_few_query_blocks_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TokenLayout(4, 6, 6, text_before=3)
    arguments = (Window(frames=3, rows=3, cols=3), layout, 147, 147, 8, 8, Morton())
    whole = block_mask(*arguments)
    blocks._mask.cache_clear()
    monkeypatch.setattr(blocks, "_PAIRS", 1)
    assert torch.equal(block_mask(*arguments), whole)


def test_a_radial_mask_grows_like_n_log_n() -> None:
    kept = []
    for frames in (16, 64):
        layout = TokenLayout(frames, 4, 4)
        mask = block_mask(Radial(), layout, layout.tokens, layout.tokens, 1, 1)
        kept.append(float(mask.sum()) / layout.tokens)
    assert kept[1] / kept[0] < 6 / 4 * 1.1  # log2(64) / log2(16); quadratic would be 4


def test_a_window_at_the_edge_keeps_its_size() -> None:
    layout = TokenLayout(1, 1, 9)
    kept = block_mask(Window(frames=1, rows=1, cols=5), layout, 9, 9, 1, 1)
    assert kept.sum(dim=1).tolist() == [5] * 9
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_lists_ascend_and_are_padded_alike() -> None:
    layout = TokenLayout(4, 8, 8, text_after=5)
    heads = (Dense(), Skip(), Band(window=20), Stripe(unit="frame", every=2))
    counts, lists = block_lists(heads, layout, 261, 261, 32, 16, "cpu")
    assert counts.dtype == lists.dtype == torch.int32
    assert counts.shape == (1, 4, 9)
    assert lists.shape == (1, 4, 9, 17)
    for h, pattern in enumerate(heads):
        mask = block_mask(pattern, layout, 261, 261, 32, 16)
        for i in range(9):
            kept = mask[i].nonzero().flatten().tolist()
            assert lists[0, h, i].tolist() == kept + [0] * (17 - len(kept))
            assert counts[0, h, i] == len(kept)


def test_lists_are_cached() -> None:
    layout = TokenLayout(2, 4, 4)
    first = block_lists([Band(window=3)], layout, 32, 32, 8, 8, "cpu")
    assert block_lists([Band(window=3)], layout, 32, 32, 8, 8, "cpu") is first


def test_cached_lists_are_real_whatever_mode_made_them() -> None:
    layout = TokenLayout(2, 4, 4)
    with FakeTensorMode(), torch.inference_mode():
        counts, lists = block_lists([Band(window=5)], layout, 32, 32, 8, 8, "cpu")
    assert type(counts) is torch.Tensor
    assert not lists.is_inference()


def test_the_text_length_may_change() -> None:
    layout = TokenLayout(2, 4, 8, text_before=16)
    mask = block_mask(Band(window=4), layout, 64 + 40, 64 + 40, 8, 8)
    assert mask[:5].all()
    assert mask[:, :5].all()
    assert not mask[5:, 5:].all()


def test_geometry_needs_a_layout_and_one_sequence() -> None:
    with pytest.raises(ValueError, match="needs a token layout"):
        block_mask(Band(window=1), None, 8, 8, 4, 4)
    with pytest.raises(ValueError, match="queries and keys of one sequence"):
        block_mask(Band(window=1), TokenLayout(1, 2, 4), 8, 12, 4, 4)
    assert block_mask(Dense(), None, 8, 12, 4, 4).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "circle"},
        {"kind": "band"},
        {"kind": "band", "window": -1},
        {"kind": "band", "window": "3"},
        {"kind": "dense", "window": 3},
        {"kind": "window", "frames": 0, "rows": 1, "cols": 1},
    ],
)
def test_malformed_patterns_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(HeadPattern).validate_python(bad)


@pytest.mark.parametrize(
    ("layout", "block"),
    [
        (TokenLayout(8, 16, 16), 64),
        (TokenLayout(16, 8, 16, text_after=77), 64),
        (TokenLayout(1, 64, 64), 128),
        (TokenLayout(1, 64, 64, text_before=512), 128),
        (TokenLayout(21, 30, 52), 128),
    ],
)
def test_candidates_span_dense_to_skip(layout: TokenLayout, block: int) -> None:
    n = layout.total
    found = candidates(layout, n, block, block)
    kept = [density(p, layout, n, n, block, block) for p in found]
    assert 10 <= len(found) <= 28
    assert (found[0], found[-1]) == (Dense(), Skip())
    assert kept == sorted(kept, reverse=True)
    assert min(kept[1:-1]) < 0.3 < 0.5 < max(kept[1:-1])
    masks = {block_mask(p, layout, n, n, block, block).numpy().tobytes() for p in found}
    assert len(masks) == len(found)


def test_without_a_layout_the_geometry_free_ends_remain() -> None:
    assert candidates(None, 4096) == (Dense(), Skip())


def test_large_sequences_stay_cheap() -> None:
    """Hunyuan 720p: 118,800 tokens; an N x N map would be 14 GB."""
    layout = TokenLayout(33, 45, 80)
    window = Window(frames=5, rows=15, cols=15)
    mask = block_mask(window, layout, layout.total, layout.total, 128, 128)
    assert mask.shape == (929, 929)
    assert 0.0 < float(mask.double().mean()) < 0.2

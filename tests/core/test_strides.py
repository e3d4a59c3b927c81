"""A forecast must look like what it replaces: compiled programs check their inputs' strides."""

from __future__ import annotations

import torch

from ditopt.assembly import _with_strides


def test_a_forecast_is_moved_to_the_strides_of_the_stack() -> None:
    base = torch.randn(2, 3, 8).transpose(1, 2)  # [2, 8, 3], as a patch embedding leaves it
    moved = _with_strides(0, base, {(0, base.shape): (24, 3, 1)})
    assert moved.stride() == (24, 3, 1)
    assert torch.equal(moved, base)


def test_nothing_is_copied_where_the_strides_agree_or_no_full_call_was_seen() -> None:
    value = torch.randn(2, 8, 3)
    assert _with_strides(0, value, {(0, value.shape): value.stride()}) is value
    assert _with_strides(0, value, {}) is value
    assert _with_strides(1, 7, {}) == 7

"""How timesteps are read: all of a run at once where they are views of one tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditopt.runtime import inputs
from ditopt.runtime.inputs import kept_values, read_timestep


@given(
    count=st.integers(2, 40),
    start=st.integers(0, 39),
    stop=st.integers(0, 40),
    step=st.integers(1, 5),
    repeats=st.integers(1, 3),
)
def test_views_have_the_values_of_their_tensor(
    count: int, start: int, stop: int, step: int, repeats: int
) -> None:
    timesteps = torch.arange(count, dtype=torch.float32) * 10
    view = timesteps[start:stop:step]
    for tensor in (view, view[None].expand(repeats, -1), view[:, None].expand(-1, repeats)):
        values = kept_values(tensor)
        if tensor.numel() > 64 or tensor.numel() >= count:
            assert values is None
        else:
            assert values == tensor.reshape(-1).tolist()


def test_a_run_is_read_once() -> None:
    timesteps = torch.linspace(1000, 0, 21)[:-1]
    reads = []
    for t in timesteps:
        assert kept_values(t.expand(2)) == [float(t)] * 2
        reads.append(inputs._kept[timesteps.untyped_storage()._cdata])
    assert all(read is reads[0] for read in reads)


def test_what_was_written_in_place_is_read_again() -> None:
    timesteps = torch.tensor([900.0, 500.0, 100.0])
    assert kept_values(timesteps[1]) == [500.0]
    timesteps.mul_(0.5)
    assert kept_values(timesteps[1]) == [250.0]
    timesteps[1:] = 7
    assert kept_values(timesteps[1]) == [7.0]


def test_freed_tensors_leave_no_values_behind() -> None:
    for n in range(50):
        timesteps = torch.full((5,), float(n))
        assert kept_values(timesteps[2]) == [float(n)]
        del timesteps
    assert len(inputs._kept) <= 8


def test_tensors_that_are_no_views_are_read_themselves() -> None:
    assert kept_values(torch.tensor([3.0])) is None
    assert kept_values(torch.zeros(10_000)[:3]) is None
    with torch.inference_mode():
        assert kept_values(torch.zeros(5)[1]) is None


@pytest.mark.parametrize(
    ("timestep", "value"),
    [
        (7, 7.0),
        (torch.tensor(5), 5.0),
        (torch.tensor([0.0, 300.0, 300.0]), 300.0),
        (torch.zeros(3), 0.0),
        (torch.tensor([100.0, 300.0]), None),
        (torch.tensor([300.0]).expand(1000), 300.0),
    ],
)
def test_one_value_or_none(timestep: object, value: float | None) -> None:
    assert read_timestep(timestep) == value

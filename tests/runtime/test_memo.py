"""What is kept between calls, and what drops it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import ditopt
from ditopt.runtime import memo as memo_module
from ditopt.runtime.memo import BY_VALUE, Memo

WIDE = BY_VALUE + 1


class Kept:
    """A memo of `weight * prompt + size`: slots 0 prompt, 1 size, 2 weight, 3 result."""

    def __init__(self, width: int = WIDE) -> None:
        self.weight = nn.Parameter(torch.full((width,), 2.0), requires_grad=False)
        self.memo = Memo(
            self._compute, inputs=(0, 1), weights=(2,), outputs=(3,), device=torch.device("cpu")
        )
        self.fails = False

    def _compute(self, env: list[Any]) -> list[Tensor]:
        if self.fails:
            raise RuntimeError("out of memory")
        return [env[2] * env[0] + env[1]]

    def __call__(self, prompt: Tensor, size: int = 0) -> str:
        """Whether the call computed or reused; checks the result."""
        env: list[Any] = [prompt, size, self.weight, None]
        before = self.memo.computed
        with torch.no_grad():
            self.memo.fill(env)
            assert torch.equal(env[3], self.weight * prompt + size)
        return "computed" if self.memo.computed > before else "reused"


@pytest.fixture
def kept() -> Kept:
    return Kept()


def prompt(width: int = WIDE) -> Tensor:
    return torch.randn(width)


def test_the_same_tensor_comes_back(kept: Kept) -> None:
    one = prompt()
    assert [kept(one) for _ in range(4)] == ["computed", "reused", "reused", "reused"]
    assert (kept.memo.computed, kept.memo.reused) == (1, 3)


def test_another_view_object_of_the_same_memory_is_the_same(kept: Kept) -> None:
    base = prompt(2 * WIDE)
    assert kept(base[:WIDE]) == "computed"
    assert kept(base[:WIDE]) == "reused"
    assert kept(base[WIDE:]) == "computed"
    assert kept(base[::2]) == "computed"


def test_equal_values_in_other_memory_are_not_looked_at(kept: Kept) -> None:
    one = prompt()
    assert kept(one) == "computed"
    assert kept(one.clone()) == "computed"


@pytest.mark.parametrize("change", [lambda p: p.add_(1), lambda p: p[:3].zero_()])
def test_a_change_in_place_is_noticed(kept: Kept, change: Callable[[Tensor], object]) -> None:
    one = prompt()
    kept(one)
    change(one)
    assert kept(one) == "computed"
    assert kept(one) == "reused"


def test_what_an_older_version_gave_is_let_go(kept: Kept) -> None:
    one = prompt()
    kept(one)
    once = kept.memo.nbytes
    one.add_(1)
    kept(one)
    assert kept.memo.nbytes == once == WIDE * 4


def test_other_data_under_the_same_object_is_noticed(kept: Kept) -> None:
    one = prompt()
    kept(one)
    one.data = prompt()
    assert kept(one) == "computed"


def test_memory_that_is_given_to_another_tensor_is_another_tensor(kept: Kept) -> None:
    for _ in range(6):  # the allocator tends to give the same address again
        assert kept(prompt()) == "computed"


def test_branches_take_turns(kept: Kept) -> None:
    branches = [prompt(), prompt(), prompt()]
    assert [kept(b) for b in branches] == ["computed"] * 3
    assert [kept(b) for b in branches * 3] == ["reused"] * 9


def test_the_least_recently_used_set_goes_first(kept: Kept) -> None:
    many = [prompt() for _ in range(8)]
    for one in many:
        kept(one)
    assert kept(many[0]) == "reused"
    extra = prompt()
    assert kept(extra) == "computed"
    assert kept(many[0]) == "reused"
    assert kept(many[1]) == "computed"


def test_memory_is_bounded(kept: Kept) -> None:
    with mock.patch.object(memo_module, "MAX_BYTES", 3 * WIDE * 4):
        many = [prompt() for _ in range(6)]
        for one in many:
            kept(one)
        assert kept.memo.nbytes == 3 * WIDE * 4
        assert kept(many[-3]) == "reused"
        assert kept(many[0]) == "computed"
    with mock.patch.object(memo_module, "MAX_BYTES", WIDE):
        kept.memo.clear()
        assert kept(many[0]) == kept(many[0]) == "computed"
        assert kept.memo.nbytes == 0


def test_the_inputs_themselves_are_not_kept_alive(kept: Kept) -> None:
    one = prompt()
    gone = weakref.ref(one)
    kept(one)
    del one
    gc.collect()
    assert gone() is None


def test_sizes_belong_to_the_key(kept: Kept) -> None:
    one = prompt()
    assert [kept(one, 1), kept(one, 2), kept(one, 1)] == ["computed", "computed", "reused"]


def test_small_tensors_on_the_host_are_known_by_value() -> None:
    kept = Kept(1)
    assert kept(torch.tensor([500.0])) == "computed"
    assert kept(torch.tensor([500.0])) == "reused"
    assert kept(torch.tensor([500.0], dtype=torch.float64)) == "computed"
    assert kept(torch.tensor([0.0])) == "computed"
    assert kept(torch.tensor([-0.0])) == "computed"
    assert kept(torch.tensor([3])) == "computed"
    assert kept(torch.tensor(3)) == "computed"


def test_a_small_tensor_on_the_host_may_be_written_to() -> None:
    kept = Kept(1)
    timestep = torch.tensor([500.0])
    kept(timestep)
    timestep.sub_(20)
    assert kept(timestep) == "computed"
    assert kept(torch.tensor([500.0])) == "reused"


def test_a_schedule_of_timesteps_stays_for_the_next_run() -> None:
    kept = Kept(1)
    first = [kept(torch.tensor([float(t)])) for t in range(100)]
    again = [kept(torch.tensor([float(t)])) for t in range(100)]
    assert set(first) == {"computed"}
    assert set(again) == {"reused"}


def in_place(kept: Kept) -> None:
    kept.weight.mul_(3)


def data_swap(kept: Kept) -> None:
    kept.weight.data = kept.weight * 5


def other_parameter(kept: Kept) -> None:
    kept.weight = nn.Parameter(kept.weight * 7, requires_grad=False)


def load(kept: Kept) -> None:
    nn.ParameterList([kept.weight]).load_state_dict({"0": torch.full((WIDE,), 11.0)})


@pytest.mark.parametrize("change", [in_place, data_swap, other_parameter, load])
def test_changed_weights_drop_everything(kept: Kept, change: Callable[[Kept], None]) -> None:
    branches = [prompt(), prompt()]
    for one in branches:
        kept(one)
    with torch.no_grad():
        change(kept)
    assert [kept(one) for one in branches] == ["computed", "computed"]
    assert [kept(one) for one in branches] == ["reused", "reused"]


def test_clear_is_for_changes_that_leave_no_trace(kept: Kept) -> None:
    one = prompt()
    kept(one)
    kept.weight.data.add_(1)
    kept.memo.clear()
    assert kept(one) == "computed"


def test_inference_tensors_are_kept_in_a_session_only(kept: Kept) -> None:
    with torch.inference_mode():
        one = prompt()
    assert kept(one) == kept(one) == "computed"
    with ditopt.session("a"):
        assert [kept(one), kept(one)] == ["computed", "reused"]
    with ditopt.session("b"):
        assert kept(one) == "computed"
    with ditopt.session("a"):
        assert kept(one) == "reused"
    with pytest.raises(ZeroDivisionError), ditopt.session("a"):
        raise ZeroDivisionError
    with ditopt.session("a"):
        assert kept(one) == "computed"
    with ditopt.session():
        assert [kept(one), kept(one)] == ["computed", "reused"]


def test_weights_that_are_inference_tensors_need_a_session(kept: Kept) -> None:
    with torch.inference_mode():
        kept.weight = torch.ones(WIDE)  # type: ignore[assignment]
    one = prompt()
    assert kept(one) == kept(one) == "computed"
    with ditopt.session("a"):
        assert [kept(one), kept(one)] == ["computed", "reused"]


def test_what_cannot_be_recognised_is_computed(kept: Kept) -> None:
    class Wrapped(Tensor):
        pass

    one = prompt().as_subclass(Wrapped)
    assert kept(one) == kept(one) == "computed"


def test_an_exception_leaves_nothing_behind(kept: Kept) -> None:
    one = prompt()
    kept.fails = True
    with pytest.raises(RuntimeError):
        kept(one)
    kept.fails = False
    assert [kept(one), kept(one)] == ["computed", "reused"]


def test_inputs_that_never_come_back_are_soon_left_alone(kept: Kept) -> None:
    looks = 0

    def lease(value: Tensor) -> Any:  # a mock would hold on to the tensors
        nonlocal looks
        looks += 1
        return StorageWeakRef(value.untyped_storage())

    with mock.patch.object(memo_module, "_lease", lease):
        for _ in range(200):
            kept(prompt())
    assert kept.memo.computed == 200
    assert looks < 30
    assert kept.memo.nbytes <= WIDE * 4


def test_and_are_tried_again_later(kept: Kept) -> None:
    for _ in range(200):
        kept(prompt())
    one = prompt()
    assert [kept(one) for _ in range(80)].count("reused") > 10
    assert kept(one) == "reused"


def test_threads_get_their_own_results(kept: Kept) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        mine = [prompt(), prompt()]
        try:
            for k in range(300):
                kept(mine[k % 2])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed

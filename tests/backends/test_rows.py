"""Rows in registers: which reductions hold their row, and what the compile cache is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from ditopt.backends.rows import MOST_NUMBERS, rows_in_registers

SALT = "post_grad_custom_post_pass"


@dataclass
class Features:
    """What Inductor says of a reduction."""

    reduction_numel: int
    hint: ReductionHint = ReductionHint.INNER

    def get_reduction_hint(self) -> ReductionHint:
        return self.hint


class Sizes:
    """Inductor's shape environment, for numbers."""

    @staticmethod
    def statically_known_leq(left: int, right: int) -> bool:
        return left <= right


class Graph:
    sizevars = Sizes()


def held(features: Features, *, cooperative: bool = False) -> bool:
    with V.set_graph_handler(Graph()):
        return bool(V.choices.should_use_persistent_reduction(features, cooperative))


@pytest.mark.parametrize(
    ("features", "before", "inside"),
    [
        (Features(1024), True, True),
        (Features(1152), False, True),
        (Features(MOST_NUMBERS), False, True),
        (Features(MOST_NUMBERS + 1), False, False),
        (Features(1152, ReductionHint.OUTER_TINY), False, False),
    ],
    ids=["short", "hidden size", "widest", "wider", "along columns"],
)
def test_which_rows_are_held(features: Features, before: bool, inside: bool) -> None:
    assert held(features) is before
    with rows_in_registers({}):
        assert held(features) is inside
    assert held(features) is before


def test_a_switch_of_inductor_s_own_still_turns_it_off() -> None:
    from torch._inductor import config

    with rows_in_registers({}), config.patch({"triton.persistent_reductions": False}):
        assert not held(Features(1152))


def test_the_compile_cache_sees_the_limit() -> None:
    with rows_in_registers({"max_autotune": True}) as options:
        assert options["max_autotune"] is True
        assert str(MOST_NUMBERS) in options[SALT].uuid()
        options[SALT](None)  # changes nothing


def test_a_pass_of_the_user_s_own_is_left_in_its_place() -> None:
    mine: Any = object()
    with rows_in_registers({SALT: mine}) as options:
        assert options == {SALT: mine}
        assert type(V.choices) is InductorChoices

"""The default backend, Inductor: three architectures at each change, all of them in `test-zoo`."""

from __future__ import annotations

import pytest

from .compiled import full_sequence, go, short_sequence
from .models import ZOO


def check(outcome):
    assert outcome.as_many_graphs, (outcome.graphs, outcome.graphs_eager)
    assert max(outcome.relative_l2) <= 1e-5, dict(
        zip(outcome.calls, outcome.relative_l2, strict=True)
    )


@pytest.mark.parametrize("name", ["pixart", "wan", "flux"])
def test_another_timestep_and_resolution(name):
    check(go(name, short_sequence(name)))


@pytest.mark.zoo
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture(name):
    check(go(name, full_sequence(name)))

"""A small DiT with a plan, as a workload and as an engine; made once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # small_dit belongs to the runtime's tests

from runtime.small_dit import CACHE, arguments, plan_for, sample, small_dit

from .engines import SPARSE, in_memory, workload_of


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    return small_dit(layers=3)


@pytest.fixture(scope="session")
def workload(model: torch.nn.Module) -> Any:
    return workload_of(model, arguments(model), sample)


@pytest.fixture(scope="session")
def plan(model: torch.nn.Module) -> Any:
    return plan_for(model, arguments(model), cache=CACHE, attention=SPARSE)


@pytest.fixture(scope="session")
def engine(workload: Any) -> Any:
    return in_memory(workload)


@pytest.fixture(scope="session")
def planned(workload: Any, plan: Any) -> Any:
    return in_memory(workload, plan)

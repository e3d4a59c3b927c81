"""Order of the zoo's tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .models import ZOO

if TYPE_CHECKING:
    import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of one model follow each other, so that a worker compiles it once."""
    places = [k for k, item in enumerate(items) if item.path.parent == HERE]
    order = {name: k for k, name in enumerate(ZOO)}

    def model(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        return order.get(callspec.params.get("name", ""), -1) if callspec is not None else -1

    for place, item in zip(places, sorted((items[k] for k in places), key=model), strict=True):
        items[place] = item

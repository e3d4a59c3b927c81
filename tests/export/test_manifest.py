"""Manifests are untrusted: an edited one is refused by the field's name or still makes sense."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditopt.errors import EngineError
from ditopt.export.manifest import Manifest

from .engines import text_of

CALM = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.lists(st.integers(-5, 2**50), max_size=5), st.just({}), st.just("../../etc/passwd"),
)  # fmt: skip


@pytest.fixture(scope="module")
def document(planned: Any) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(text_of(planned))
    return parsed


def paths(part: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every member of a JSON value is."""
    items = part.items() if isinstance(part, dict) else enumerate(part)
    found = []
    for key, member in items:
        found.append((*prefix, key))
        if isinstance(member, dict | list):
            found += paths(member, (*prefix, key))
    return found


def edited(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    part: Any = changed
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return changed


def parse(document: Any) -> Manifest:
    return Manifest.from_text(json.dumps(document))


def test_a_manifest_survives_its_text(document: dict[str, Any]) -> None:
    manifest = parse(document)
    assert Manifest.from_text(manifest.to_text()) == manifest


@CALM
@given(data=st.data())
def test_any_edit_is_refused_or_harmless(document: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(paths(document)))
    try:
        manifest = parse(edited(document, path, data.draw(VALUES)))
    except EngineError:
        return  # any other exception fails the test
    assert Manifest.from_text(manifest.to_text()) == manifest


@CALM
@given(data=st.data())
def test_any_deletion_is_refused_or_harmless(document: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(paths(document)))
    changed = copy.deepcopy(document)
    part: Any = changed
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    with contextlib.suppress(EngineError):  # any other exception fails the test
        parse(changed)


@CALM
@given(text=st.one_of(st.text(), st.just("[" * 100_000), st.just('{"ditopt_engine": 1}')))
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(EngineError):
        Manifest.from_text(text)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("ditopt_engine",), 2, "^ditopt_engine: expected version 1, got 2"),
        (("ditopt_engine",), True, "^ditopt_engine: expected version 1"),
        (("format",), "exe", "^format: "),
        (("surprise",), 1, "^surprise: "),
        (("programs", 0, "file"), "../../bin/sh", "^programs.0.file: "),
        (("programs", 0, "file"), "/bin/sh", "^programs.0.file: "),
        (("programs", 0, "file"), "programs/other.pt2", "^programs: programs/other.pt2 is not"),
        (("call", "inputs", 0, "spec", "shape"), [2**60], "^call.inputs.0.spec.shape.0: "),
        (("call", "inputs", 0, "spec", "shape"), [2**30] * 4, "^call.inputs.0.spec: .*at most"),
        (("call", "inputs", 0, "spec", "stride"), [1], "^call.inputs.0.spec: .*strides"),
        (("call", "inputs", 0, "spec", "shape"), [-1, 3, 8, 8], "^call.inputs.0.spec.shape.0: "),
        (("call", "inputs", 0, "spec", "dtype"), "object", "^call.inputs.0.spec.dtype: "),
        (("call", "inputs", 0, "spec", "shape"), [1, 3, 8, 6], r"^wiring.*the program takes"),
        (("call", "inputs", 0, "name"), "timestep", "^call.inputs: a name appears twice"),
        (("call", "result"), ["tuple", [["", "tensor"]] * 2], "^wiring.returned: 1 slot"),
        (("call", "result"), "everything", "^call.result: "),
        (("wiring", "slots"), 1, "^wiring.slots: "),
        (("wiring", "slots"), 2**40, "^wiring.slots: "),
        (("wiring", "before", 0, "program"), 99, r"^wiring.before\[0\].program: there is no"),
        (("wiring", "before", 0, "inputs", 0), 7, r"^wiring.before\[0\].inputs\[0\]: nothing"),
        (("wiring", "before", 0, "inputs", 1), "nobody", r"nothing fills 'nobody'"),
        (("wiring", "returned"), [0, 1], "^wiring.returned: 2 slots"),
        (("wiring", "kept_by_phase"), [[]], "^wiring.kept_by_phase: expected 2 lists"),
        (("wiring", "kept_by_phase", 0), [9], r"^wiring.kept_by_phase\[0\]: there is no"),
        (("wiring", "stack", "bases"), [], "^wiring.stack.bases: expected 1"),
        (("schedule", "phases", 0), 9, "^schedule.phases: there are 2 phases"),
        (("tensors",), {}, "nothing fills '"),
    ],
)  # fmt: skip
def test_each_part_is_refused_by_its_name(
    document: dict[str, Any], path: tuple[Any, ...], value: Any, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        parse(edited(document, path, value))


def test_a_weight_of_another_shape_does_not_reach_a_program(document: dict[str, Any]) -> None:
    name = next(name for name in document["tensors"] if name.endswith("out.weight"))
    spec = {**document["tensors"][name], "shape": [1, 1], "stride": [1, 1]}
    with pytest.raises(EngineError, match=r"^wiring.*inputs\[\d+\]: the program takes"):
        parse(edited(document, ("tensors", name), spec))

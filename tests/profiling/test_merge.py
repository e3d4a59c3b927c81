"""Profiles of several seeds as one, and what cannot be merged."""

from pathlib import Path

import pytest

from ditopt.errors import ProfileError
from ditopt.profiling import Analysis, Profile, load_complete, merge_profiles
from ditopt.profiling.run import ProfileSpec

from .test_profile import SPEC, Other, run, toy_workload


def recorded(folder: Path, first: int, seeds: int, hardware: str = "a CPU") -> Profile:
    done = run(folder, seeds=seeds, spec=SPEC.model_copy(update={"first_seed": first}))
    done = done.model_copy(
        update={
            "hardware": done.hardware.model_copy(update={"name": hardware}),
            "costs": done.costs.model_copy(update={"dense_call_ms": 100.0 + first}),
        }
    )
    done.save(folder)
    return done


def test_merged_seeds_are_those_of_one_long_profile(tmp_path: Path) -> None:
    recorded(tmp_path / "a", 0, 2)
    recorded(tmp_path / "b", 1, 2)
    whole = run(tmp_path / "whole", seeds=3)
    merged = merge_profiles([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    profile, records = load_complete(tmp_path / "out")
    assert profile == merged
    assert profile.seeds == whole.seeds == (0, 1, 2)
    _, expected = load_complete(tmp_path / "whole")
    for record, same in zip(records, expected, strict=True):
        assert record.gram.equal(same.gram)
        assert all(record.squared_error[s].equal(same.squared_error[s]) for s in profile.shapes)
    analysis = Analysis.load(tmp_path / "out")
    assert analysis is not None
    assert analysis == Analysis.load(tmp_path / "whole")
    assert analysis.seeds == (0, 1, 2)


def test_costs_are_those_of_the_named_machine(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    recorded(folders[0], 0, 1, "one")
    recorded(folders[1], 5, 1, "two")
    (folders[1] / "linears.json").write_text("{}")
    merged = merge_profiles(folders, tmp_path / "out", costs_of=folders[1])
    assert (merged.hardware.name, merged.seeds) == ("two", (0, 5))
    assert merged.costs is not None
    assert merged.costs.dense_call_ms == 105.0
    assert "merged from 2 profiles, costs of two (cpu, torch" in merged.notes[-1]
    assert (tmp_path / "out" / "linears.json").read_text() == "{}"
    first = merge_profiles(folders, tmp_path / "first")
    assert first.hardware.name == "one"
    assert not (tmp_path / "first" / "linears.json").exists()


def test_what_cannot_be_merged_is_named(tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "b"
    recorded(here, 0, 1)
    with pytest.raises(ProfileError, match="at least two profiles"):
        merge_profiles([here], tmp_path / "out")
    with pytest.raises(ProfileError, match=r"'.*b' holds no profile"):
        merge_profiles([here, there], tmp_path / "out")
    run(there, toy_workload(model=Other().eval()), seeds=1)
    with pytest.raises(ProfileError, match=r"different things: model differs"):
        merge_profiles([here, there], tmp_path / "out")
    fewer = ProfileSpec(observed_calls=2, block={"q": 8, "k": 8})
    run(tmp_path / "c", spec=fewer, seeds=1)
    with pytest.raises(ProfileError, match=r"observed_calls differs"):
        merge_profiles([here, tmp_path / "c"], tmp_path / "out")
    recorded(tmp_path / "d", 1, 1)
    with pytest.raises(ProfileError, match="is not one of the merged profiles"):
        merge_profiles([here, tmp_path / "d"], tmp_path / "out", costs_of=there)
    with pytest.raises(ProfileError, match="holds a profile already"):
        merge_profiles([here, tmp_path / "d"], there)
    (tmp_path / "d" / "maps_1.safetensors").write_bytes(b"x")
    with pytest.raises(ProfileError, match=r"maps_1\.safetensors is missing or damaged"):
        merge_profiles([here, tmp_path / "d"], tmp_path / "out")
    assert not (tmp_path / "out" / "profile.json").exists()

"""Profiles of one workload from several runs or machines as one: seeds together, one's costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ditopt import files
from ditopt.errors import ProfileError
from ditopt.profiling.analysis import analyse_folder
from ditopt.profiling.arithmetics import NOT_OFFERED
from ditopt.profiling.map_record import MapRecord, maps_path
from ditopt.profiling.schema import PROFILE_NAME, Profile, load_complete, seed_path

_SAME = (
    "model",
    "sampler",
    "layout",
    "block",
    "options",
    "orders",
    "selectors",
    "arithmetics",
    "shapes",
    "observed_calls",
    "data_range",
)
_OF_THE_MACHINE = ("linears.json", "linears.safetensors")


def merge_profiles(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    costs_of: str | os.PathLike[str] | None = None,
) -> Profile:
    """Write a profile with the seeds of several, and analyse it anew.

    A seed that several hold is taken from the first of them.

    Args:
        folders: finished profiles of the same model, sampler and options.
        out: folder to write; it may not hold a profile yet.
        costs_of: the folder among them whose hardware and measured times the result has; the first
            by default. Linear layers come from it, too.

    Raises:
        ProfileError: a folder is no finished profile, or of something else; by name.
    """
    paths, target = [Path(folder) for folder in folders], Path(out)
    machine = paths[0] if costs_of is None else Path(costs_of)
    if len(paths) < 2:
        raise ProfileError("merging needs at least two profiles", remedy="Name their folders.")
    if machine not in paths:
        raise ProfileError(
            f"{str(machine)!r} is not one of the merged profiles",
            remedy="Take the costs of one of: " + ", ".join(map(str, paths)) + ".",
        )
    if (target / PROFILE_NAME).exists():
        raise ProfileError(
            f"{str(target)!r} holds a profile already", remedy="Merge into a new folder."
        )
    profiles = {path: load_complete(path)[0] for path in paths}
    first = profiles[paths[0]]
    for path, other in profiles.items():
        _refuse_other(paths[0], first, path, other)
    home = {seed: path for path in reversed(paths) for seed in profiles[path].seeds}
    files.make_folder(target)
    for seed, path in sorted(home.items()):
        MapRecord.load(path, seed, first)  # damage is named before it is copied
        _copy(maps_path(path, seed), maps_path(target, seed))
        _copy(seed_path(path, seed), seed_path(target, seed))
    for name in _OF_THE_MACHINE:
        if (machine / name).is_file():
            _copy(machine / name, target / name)
    measured = profiles[machine]
    notes = dict.fromkeys(
        note
        for profile in profiles.values()
        for note in profile.notes
        if profile is measured or not note.startswith(NOT_OFFERED)
    )
    merged = measured.model_copy(
        update={
            "seeds": tuple(sorted(home)),
            "finished": tuple(sorted(home)),
            "notes": (*notes, f"merged from {len(paths)} profiles, costs of {_name(measured)}"),
        }
    )
    merged.save(target)
    analyse_folder(target)
    return merged


def _refuse_other(here: Path, first: Profile, there: Path, other: Profile) -> None:
    for field in _SAME:
        if getattr(first, field) != getattr(other, field):
            raise ProfileError(
                f"{str(here)!r} and {str(there)!r} are profiles of different things: "
                f"{field} differs",
                remedy="Profile both with the same workload and options.",
            )


def _name(profile: Profile) -> str:
    hardware = profile.hardware
    return f"{hardware.name} ({hardware.device}, torch {hardware.torch})"


def _copy(source: Path, target: Path) -> None:
    with files.atomic_path(target) as temporary:
        temporary.write_bytes(source.read_bytes())

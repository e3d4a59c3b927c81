"""Classes, stability and verdicts from made-up errors and masses."""

from pathlib import Path

import pytest

from ditopt.errors import ProfileError
from ditopt.layout import TokenLayout
from ditopt.patterns import (
    Band,
    Circle,
    Dense,
    FrameTile,
    HeadPattern,
    MultiDiagonal,
    Periodic,
    Radial,
    Skip,
    Stripe,
    Window,
)
from ditopt.profiling import Analysis, ProfileSpec
from ditopt.profiling.analysis import _verdict
from ditopt.profiling.structure import Structure, structure_of

from .test_profile import run

VIDEO, IMAGE = TokenLayout(8, 16, 16), TokenLayout(1, 16, 16)


def lattice(frames: int, rows: int, width: int = 1) -> Periodic:
    return Periodic(
        frame_width=1,
        frame_offset=0,
        frame_period=frames,
        row_width=width,
        row_offset=0,
        row_period=rows,
    )


@pytest.mark.parametrize(
    ("pattern", "layout", "expected"),
    [
        (Dense(), VIDEO, None),
        (Skip(), VIDEO, None),
        (Band(window=64), VIDEO, "spatial"),
        (Radial(), VIDEO, "spatial"),
        (MultiDiagonal(period="frame", width=4), VIDEO, "temporal"),
        (MultiDiagonal(period="row", width=1), IMAGE, "stripe"),
        (Window(frames=1, rows=16, cols=16), VIDEO, "spatial"),
        (Window(frames=8, rows=5, cols=5), VIDEO, "temporal"),
        (Window(frames=1, rows=5, cols=5), IMAGE, "spatial"),
        (Circle(radius=3, frames=8), VIDEO, "temporal"),
        (Circle(radius=8), IMAGE, "spatial"),
        (Stripe(unit="frame", every=2), VIDEO, "stripe"),
        (Stripe(unit="frame", every=8, reach=1), VIDEO, "sink"),
        (Stripe(unit="row", every=16), IMAGE, "sink"),
        (FrameTile(references=2), VIDEO, "stripe"),
        (FrameTile(references=1), VIDEO, "sink"),
        (lattice(frames=2, rows=1), VIDEO, "stripe"),
        (lattice(frames=1, rows=4), VIDEO, "stripe"),
        (lattice(frames=1, rows=64, width=4), VIDEO, "temporal"),
        (lattice(frames=32, rows=64, width=4), VIDEO, "spatial"),
    ],
)
def test_patterns_stand_for_structures(
    pattern: HeadPattern, layout: TokenLayout, expected: Structure | None
) -> None:
    assert structure_of(pattern, layout) == expected


@pytest.mark.parametrize(
    ("structure", "jaccards", "ranks", "expected"),
    [
        ("diffuse", (1.0, 1.0), (1.0, 1.0), "dense"),
        ("spatial", (0.9, 0.9), (0.1, 0.1), "static"),
        ("spatial", (0.5, 0.9), (0.9, 0.9), "static"),
        ("spatial", (0.5, 0.9), (0.9, 0.5), "refresh"),
        ("cluster", (0.9, 0.9), (0.9, 0.9), "refresh"),
        ("sink", (None, None), (None, None), "static"),
    ],
)
def test_only_what_stays_is_static(
    structure: Structure,
    jaccards: tuple[float | None, ...],
    ranks: tuple[float | None, ...],
    expected: str,
) -> None:
    assert _verdict(structure, jaccards, ranks) == expected


def test_a_profile_ends_with_its_analysis(tmp_path: Path) -> None:
    done = run(tmp_path)
    found = Analysis.load(tmp_path)
    assert found is not None
    assert found.seeds == (0, 1)
    assert list(found.sites) == list(done.shapes)
    for heads in found.sites.values():
        assert len(heads) == 2
        for head in heads:
            assert 0 < head.density_at_recall_90 <= 1
            assert head.jaccard_seeds is not None
            assert 0 <= head.jaccard_seeds <= 1
            assert head.rank_steps is not None
            assert done.options[head.option].pattern.kind in (head.kind, "dense")


def test_one_seed_and_one_call_have_nothing_to_compare(tmp_path: Path) -> None:
    run(tmp_path, seeds=1, spec=ProfileSpec(observed_calls=1, block={"q": 8, "k": 8}))
    found = Analysis.load(tmp_path)
    assert found is not None
    head = found.sites["blocks.0.attn1#0"][0]
    assert (head.jaccard_seeds, head.jaccard_steps, head.rank_seeds) == (None, None, None)


def test_a_missing_and_a_damaged_analysis(tmp_path: Path) -> None:
    assert Analysis.load(tmp_path) is None
    (tmp_path / "analysis.json").write_text('{"ditopt_analysis": 9}')
    with pytest.raises(ProfileError, match=r"analysis\.json: ditopt_analysis"):
        Analysis.load(tmp_path)


def test_lost_maps_are_measured_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "maps_1.safetensors").read_bytes()
    (tmp_path / "maps_1.safetensors").unlink()
    run(tmp_path)
    assert (tmp_path / "maps_1.safetensors").read_bytes() == before

"""Plan schema version 1: round trips, refusals that name the field, and hostile files."""

import contextlib
import copy
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ditopt.errors import FileError, PlanError
from ditopt.patterns import Band, Dense, MultiDiagonal, Skip, Stripe, Window
from ditopt.plan import Plan

SITES = [
    {"id": "blocks.0.attn1#0", "kind": "self", "heads": 2, "head_dim": 64},
    {"id": "blocks.0.attn2#0", "kind": "cross", "heads": 2, "head_dim": 64},
    {"id": "blocks.1.attn1#0", "kind": "self", "heads": 3, "head_dim": 64},
]


def document() -> dict[str, Any]:
    return {
        "ditopt_plan": 1,
        "model": {
            "architecture": "a" * 64,
            "weights": "b" * 64,
            "name": "TinyVideoDiT",
            "sites": copy.deepcopy(SITES),
        },
        "sampler": {
            "calls": 6,
            "branches": 1,
            "timestep": "timestep",
            "timesteps": [999.0, 800.5, 600.25, 400.0, 200.0, 0.1],
            "varying": ["hidden_states", "timestep"],
        },
        "hardware": {"device": "cpu", "name": "a CPU", "torch": "2.13.0", "threads": 2},
        "goal": {"min_psnr_db": 30.0, "target_speedup": None},
        "layout": {"frames": 4, "height": 8, "width": 8, "text_before": 0, "text_after": 0},
        "block": {"q": 64, "k": 64},
        "phases": [
            {"calls": [0, 2], "attention": {}},
            {
                "calls": [2, 6],
                "attention": {
                    "blocks.0.attn1#0": [{"kind": "dense"}, {"kind": "band", "window": 64}],
                    "blocks.0.attn2#0": [{"kind": "dense"}, {"kind": "skip"}],
                },
            },
        ],
        "cache": {
            "full": [0, 1, 2, 4],
            "history": 2,
            "coefficients": {"3": [1.6, -0.6], "5": [1.0]},
        },
        "predicted": {"seconds": 6.1, "speedup": 1.7, "psnr_db": 31.0, "density": 0.4},
        "verification": [
            {
                "purpose": "audit",
                "seeds": [2000, 2001],
                "psnr_db": [31.0, 33.0],
                "mean_psnr_db": 32.0,
                "min_psnr_db": 31.0,
                "p10_psnr_db": 31.2,
                "mean_ssim": 0.95,
                "speedup": 1.65,
                "margin_db": 0.5,
                "passed": True,
                "adopted": True,
            }
        ],
        "assumptions": ["both guidance branches share one plan"],
        "side_file": None,
    }


def plan() -> Plan:
    return Plan.from_text(yaml.safe_dump(document(), sort_keys=False))


@dataclass(frozen=True)
class Site:
    id: str
    kind: str
    heads: int
    head_dim: int


CAPTURED = tuple(Site(**record) for record in SITES)


def changed(path: str, value: Any) -> str:
    """The document with one value replaced (or, for `...`, removed) at a dotted path."""
    root: Any = document()
    root["cache"]["coefficients"] = {3: [1.6, -0.6], 5: [1.0]}
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    node = root
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return yaml.safe_dump(root, sort_keys=False)


def test_plans_are_compared_by_their_choices_and_not_as_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, same = plan(), plan()
    other = Plan.from_text(changed("hardware/threads", 3))
    monkeypatch.setattr(Plan, "to_text", lambda self: pytest.fail("slow: Dynamo asks often"))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != "plan"


def test_saving_and_loading_gives_the_same_plan_and_text(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.yaml")
    loaded = Plan.load(tmp_path / "plan.yaml")
    assert loaded == plan()
    assert loaded.to_text() == plan().to_text() == (tmp_path / "plan.yaml").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.yaml"]


def test_the_text_reads_well() -> None:
    text = plan().to_text()
    assert text.startswith("ditopt_plan: 1\nmodel:\n")
    assert "  - {kind: band, window: 64}\n" in text
    assert "full: [0, 1, 2, 4]" in text


def test_rules_stand_in_natural_order_of_sites() -> None:
    text = changed("model/sites/0/id", "blocks.10.attn1#0").replace(
        "blocks.0.attn1#0", "blocks.10.attn1#0"
    )
    assert list(Plan.from_text(text).phases[1].attention) == [
        "blocks.0.attn2#0",
        "blocks.10.attn1#0",
    ]


def test_phases_are_found_by_call() -> None:
    assert plan().phase(1).attention == {}
    assert plan().phase(2).attention["blocks.0.attn1#0"] == (Dense(), Band(window=64))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", "red", "colour: unknown key"),
        ("model/sites/0/colour", "red", r"model.sites\[0\].colour: unknown key"),
        ("hardware", ..., "hardware: missing"),
        ("ditopt_plan", 2, "expected version 1, got 2"),
        ("ditopt_plan", True, "expected version 1, got True"),
        ("sampler/calls", "6", "sampler.calls: .*got '6'"),
        ("sampler/calls", 7, "sampler.timesteps: expected 7 values"),
        ("sampler/timestep", "time", "'time' is not among sampler.varying"),
        ("model/weights", "b", "model.weights: "),
        ("model/sites/1/id", "blocks.0.attn1#0", "an id stands twice"),
        ("goal", {}, "at least one of min_psnr_db, min_ssim, target_speedup, max_memory_bytes"),
        ("goal/min_ssim", 1.0, "goal.min_ssim"),
        ("goal/min_psnr_db", float("nan"), "goal.min_psnr_db"),
        ("layout/frames", 0, "layout: .*frames must be at least 1"),
        ("layout/depth", 1, "layout.depth: "),
        ("layout", None, "pattern 'band' needs `layout`"),
        ("phases/0/calls", [0, 1], r"phases\[1\].calls: .*starts at 1"),
        ("phases/1/calls", [2, 5], "cover calls 0 to 5, the sampler makes 6"),
        ("phases/1/calls", [2, 2], "not empty"),
        (
            "phases/1/attention/blocks.0.atn1#0",
            [{"kind": "skip"}],
            "Did you mean 'blocks.0.attn1#0'",
        ),
        (
            "phases/1/attention/blocks.1.attn1#0",
            [{"kind": "skip"}],
            "expected 3 patterns, one per head",
        ),
        ("phases/1/attention/blocks.0.attn1#0/1", {"kind": "ring"}, "'ring'"),
        ("phases/1/attention/blocks.0.attn1#0/1/window", -1, r"\.window: .*got -1"),
        (
            "phases/1/attention/blocks.0.attn2#0/1",
            {"kind": "band", "window": 1},
            "cross-attention takes",
        ),
        ("cache/full", [1, 2, 4], "ascending call indices from 0"),
        ("cache/full", [0, 2, 1, 4], "ascending"),
        ("cache/full", [0, 1, 4], "call 2 is neither"),
        ("cache/coefficients/3", [1.6, -0.5], r"cache.coefficients\[3\]: expected a sum of 1"),
        ("cache/coefficients/3", [21.0, -20.0], "magnitudes that sum to 32 at most, got 41"),
        ("cache/coefficients/3", [1.0, 0.5, -0.5], "expected 1 to 2 numbers"),
        ("cache/coefficients/4", [1.0], "call 4 is full"),
        ("cache/coefficients/6", [1.0], "call 6 does not exist"),
        ("side_file", {"name": "../x.safetensors", "sha256": "a" * 64}, "side_file.name"),
    ],
)
def test_each_mistake_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_text(changed(path, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("- 1\n", "expected a YAML mapping"),
        ("ditopt_plan: 1\nditopt_plan: 1\n", "line 2: key 'ditopt_plan' stands twice"),
        ("ditopt_plan: !!python/object/apply:os.system ['true']\n", "tag '.*' is refused"),
        ("ditopt_plan: !!int '1'\n", "tag '.*' is refused"),
        ("ditopt_plan: &a 1\nmodel: *a\n", "anchors and aliases are refused"),
        ("ditopt_plan: 1\n---\nditopt_plan: 1\n", "one YAML document"),
        ("ditopt_plan: [\n", "not valid YAML"),
        ("{[1]: 2}\n", "a key must be text"),
        ("[" * 5000, "nested more than"),
        ("x" * (16 << 20) + "x", "at most"),
    ],
)
def test_hostile_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_text(text)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read .*plan\.yaml"):
        Plan.load(tmp_path / "plan.yaml")


def test_errors_of_a_file_name_it(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("ditopt_plan: 3\n")
    with pytest.raises(PlanError, match=r"^plan\.yaml: ditopt_plan: expected version 1"):
        Plan.load(tmp_path / "plan.yaml")


def test_tensors_travel_in_the_side_file(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(2, dtype=torch.bfloat16)}
    plan().with_tensors(tensors).save(tmp_path / "plan.yaml")
    loaded = Plan.load(tmp_path / "plan.yaml")
    assert set(loaded.tensors) == {"a", "b"}
    for name, tensor in tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
    assert loaded.side_file is not None
    assert loaded.side_file.name == "plan.safetensors"


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_side_file_is_refused(tmp_path: Path, damage: str) -> None:
    plan().with_tensors({"a": torch.ones(64)}).save(tmp_path / "plan.yaml")
    path = tmp_path / "plan.safetensors"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-8] if damage == "truncated" else data[:-1] + b"\x01")
    with pytest.raises(PlanError, match=r"side_file: .*plan\.safetensors"):
        Plan.load(tmp_path / "plan.yaml")


def test_a_failed_save_leaves_the_old_plan(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "plan.yaml"
    plan().save(path)
    before = path.read_bytes()

    def full_disk(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(FileError, match="No space left on device"):
        plan().model_copy(update={"assumptions": ("other",)}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.yaml"]


def test_the_profiled_model_is_accepted_without_warning() -> None:
    assert plan().validate_against(CAPTURED, "a" * 64, "b" * 64) == ()


def test_other_weights_are_a_warning() -> None:
    (warning,) = plan().validate_against(CAPTURED, "a" * 64, "c" * 64)
    assert "quality not verified" in warning


def test_other_weights_are_an_error_with_derived_tensors() -> None:
    with pytest.raises(PlanError, match="tensors derived from the weights of another model"):
        plan().with_tensors({"a": torch.ones(1)}).validate_against(CAPTURED, "a" * 64, "c" * 64)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (CAPTURED[:2], "site 'blocks.1.attn1#0' is in the plan only"),
        ((*CAPTURED, Site("x#0", "self", 1, 8)), "site 'x#0' is in the model only"),
        ((Site("blocks.0.attn1#0", "self", 4, 32), *CAPTURED[1:]), "has heads 4, the plan says 2"),
        (CAPTURED, "parameter names, shapes or dtypes differ"),
    ],
)
def test_another_architecture_says_what_differs(sites: tuple[Site, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan().validate_against(sites, "f" * 64, "b" * 64)


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
lengths = st.integers(1, 100)
units = st.sampled_from(["frame", "row"])
floats = st.floats(-1e6, 1e6, allow_nan=False)
patterns = st.one_of(
    st.builds(Dense),
    st.builds(Skip),
    st.builds(Band, window=lengths),
    st.builds(MultiDiagonal, period=units, width=lengths),
    st.builds(Stripe, unit=units, every=lengths, reach=lengths),
    st.builds(Window, frames=lengths, rows=lengths, cols=lengths),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    base = document()
    ids = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    calls = draw(st.integers(1, 12))
    heads = {site: draw(st.integers(1, 3)) for site in ids}
    full = [0, *sorted(draw(st.sets(st.integers(1, calls), max_size=calls)) - {calls})]
    base["model"] |= {
        "name": draw(names),
        "sites": [{"id": i, "kind": "self", "heads": h, "head_dim": 8} for i, h in heads.items()],
    }
    base["sampler"] = {"calls": calls, "timesteps": [draw(floats) for _ in range(calls)]}
    base["phases"] = [
        {
            "calls": [0, calls],
            "attention": {
                site: draw(st.lists(patterns, min_size=heads[site], max_size=heads[site]))
                for site in draw(st.sets(st.sampled_from(ids)))
            },
        }
    ]
    weight = draw(st.floats(-2, 2))
    base["cache"] = {
        "full": full,
        "history": 2,
        "coefficients": {
            call: [1.0] if call < full[-1] or len(full) < 2 else [weight, 1 - weight]
            for call in range(calls)
            if call not in full
        },
    }
    base["assumptions"] = draw(st.lists(names, max_size=2))
    return Plan.model_validate(base)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_any_plan_survives_the_round_trip(original: Plan) -> None:
    again = Plan.from_text(original.to_text())
    assert again == original
    assert again.model_dump() == original.model_dump()


TEXT = yaml.safe_dump(document(), sort_keys=False)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, len(TEXT)),
    st.integers(0, 40),
    st.text(string.printable, max_size=12) | st.text(max_size=6),
)
def test_corruption_raises_nothing_but_plan_errors(start: int, cut: int, junk: str) -> None:
    corrupt = TEXT[:start] + junk + TEXT[start + cut :]
    with contextlib.suppress(PlanError):
        Plan.from_text(corrupt)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 200),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)
def test_any_value_in_any_place_raises_nothing_but_plan_errors(place: int, value: Any) -> None:
    root = document()
    slots = list(_slots(root))
    container, key = slots[place % len(slots)]
    container[key] = value
    with contextlib.suppress(PlanError):
        Plan.from_text(yaml.safe_dump(root, sort_keys=False))


def _slots(node: Any) -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in list(items):
        yield node, key
        if isinstance(child, dict | list):
            yield from _slots(child)

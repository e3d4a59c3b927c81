"""Costs by peak rates, and tables that are kept from profile to profile."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.errors import ProfileError
from ditopt.plan import Block, Hardware
from ditopt.profiling import cost_cache
from ditopt.profiling.cost_cache import attention_table, cache_folder, kept_linear_costs
from ditopt.profiling.linear_schema import LinearCost
from ditopt.profiling.roofline import (
    DEVICES,
    Device,
    find_device,
    roofline_attention,
    roofline_costs,
)
from ditopt.profiling.schema import AttentionCost, SiteShape

from .test_profile import SPEC, run

SHAPE = SiteShape(batch=1, heads=8, tokens=16384, head_dim=128, dtype="bfloat16")
HERE = Hardware(device="cpu", name="a CPU", torch="2.13.0", threads=2)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            y = block(x)
            x = nn.functional.scaled_dot_product_attention(y[None], y[None], y[None])[0]
        return x


def test_attention_takes_its_flops_over_the_peak_rate() -> None:
    table = roofline_attention(SHAPE, Block(q=128, k=128), DEVICES["H100-SXM"])
    flops = 4 * 8 * 16384**2 * 128
    assert table.dense_ms == pytest.approx(1e3 * flops / 989.4e12)
    assert dict(table.sparse_ms)[0.25] == pytest.approx(table.dense_ms / 4)
    assert dict(table.sparse_ms)[0.1] < dict(table.mean_ms)[0.1] < 1.1 * dict(table.sparse_ms)[0.1]
    slow = roofline_attention(SHAPE, Block(q=128, k=128), Device(1e15, 1e15, 1e9))
    assert slow.dense_ms == pytest.approx(1e3 * 4 * 8 * 16384 * 128 * 2 / 1e9)


def test_calls_count_the_blocks_apart() -> None:
    model, x = Blocks().eval(), torch.randn(64, 8)
    profile = type("P", (), {"shapes": {"a#0": SHAPE}, "block": Block(q=128, k=128)})()
    costs = roofline_costs(model, {"x": x}, profile, "L40S")
    single = DEVICES["L40S"].single_flops
    moved = DEVICES["L40S"].bytes_per_s
    weights = sum(p.nbytes for p in model.parameters())
    flops = 2 * 64 * 8 * 32 + 3 * (2 * 64 * 32 * 32 + 4 * 64 * 64 * 32)
    assert costs.dense_call_ms == pytest.approx(1e3 * max(flops / single, weights / moved))
    outside = max(2 * 64 * 8 * 32 / single, sum(p.nbytes for p in model.into.parameters()) / moved)
    # The attentions of this model are between its blocks, so they count as outside.
    between = (2 * 64 * 8 * 32 + 3 * 4 * 64 * 64 * 32) / single
    assert costs.skip_call_ms == pytest.approx(1e3 * max(outside, between))
    assert costs.source == "roofline"


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ProfileError, match=r"'H200'.*Known: A100-SXM-80GB, H100-SXM, H200-SXM"):
        find_device("H200")


def test_a_profile_for_another_device_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, seeds=1, spec=SPEC.model_copy(update={"for_device": "H200-SXM"}))
    assert done.costs is not None
    assert done.costs.source == "roofline"
    assert done.hardware.name == "H200-SXM"
    assert done.notes[-1] == (
        "costs are what the peak rates of H200-SXM allow, not measured; measure on the device"
    )
    here = run(tmp_path, seeds=1)  # the seeds are kept, the costs measured
    assert here.costs is not None
    assert here.costs.source == "measured"
    assert not any("peak rates" in note for note in here.notes)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def measure() -> AttentionCost:
        made.append(len(made) + 1.0)
        return AttentionCost(shape=SHAPE, dense_ms=made[-1], sparse_ms=((1.0, 2.0), (0.5, 1.0)))

    def table(**changes: Any) -> tuple[float, bool]:
        facts = {"shape": SHAPE, "block": Block(q=64, k=64), "hardware": HERE, **changes}
        again = facts.pop("again", False)
        found, known = attention_table(**facts, measure=measure, again=again)
        return found.dense_ms, known

    return table


def test_a_machine_measures_a_shape_once(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured() == (1.0, False)
    assert measured() == (1.0, True)
    assert measured(again=True) == (2.0, False)
    assert measured() == (2.0, True)
    for changes in (
        {"shape": SHAPE.model_copy(update={"heads": 4})},
        {"block": Block(q=128, k=64)},
        {"hardware": HERE.model_copy(update={"name": "another CPU"})},
        {"hardware": HERE.model_copy(update={"torch": "2.14.0"})},
        {"hardware": HERE.model_copy(update={"threads": 4})},
    ):
        assert not measured(**changes)[1], changes
    monkeypatch.setattr(cost_cache.ditopt, "__version__", "0.0.0")
    assert not measured()[1]


def test_shapes_of_layers_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def measure(shapes: Any, formats: Any, device: Any, dtype: Any) -> Any:
        made.extend(shapes)
        return tuple(LinearCost(shape=s, plain_ms=1.0, format_ms={}) for s in shapes)

    monkeypatch.setattr(cost_cache, "measure_linear_costs", measure)
    facts = (["int8_row"], torch.device("cpu"), torch.float32)
    first = kept_linear_costs(HERE)([(8, 16, 32), (8, 32, 16)], *facts)
    assert first == kept_linear_costs(HERE)([(8, 16, 32), (8, 32, 16)], *facts)
    assert made == [(8, 16, 32), (8, 32, 16)]
    kept_linear_costs(HERE)([(8, 16, 32)], ["fp8_row"], *facts[1:])
    kept_linear_costs(HERE, again=True)([(8, 16, 32)], *facts)
    assert made[2:] == [(8, 16, 32), (8, 16, 32)]


def test_a_damaged_table_is_measured_again(measured: Any) -> None:
    measured()
    (path,) = cache_folder().iterdir()
    path.write_text("{")
    assert measured() == (2.0, False)
    assert measured() == (2.0, True)


def test_a_home_that_cannot_be_written_does_not_stop_a_profile(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measured() == (1.0, False)
    assert measured() == (2.0, False)

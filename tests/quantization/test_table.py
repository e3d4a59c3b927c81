"""The table of linear layers: what ran, what it holds, why a layer was left."""

from __future__ import annotations

import torch

from ditopt.inspection import explain_fully
from ditopt.quantization.table import totals
from ditopt.workload import Workload

from .small_model import Model, plan_for

X, T = (torch.randn(2, n, 64, generator=torch.Generator().manual_seed(n)) for n in (33, 1))


@torch.no_grad()
def test_every_layer_has_its_row() -> None:
    torch.manual_seed(0)
    model = Model(blocks=1).eval()
    rules = {f"blocks.0.to_{x}": {"format": "int8_row"} for x in "qkv"}
    rules["blocks.0.up"] = {"format": "fp8_row", "simulate": True}
    rules["blocks.0.down"] = {"format": "fp8_row"}
    rules["blocks.0.to_out"] = {"format": "int4_group"}
    workload = Workload(model, lambda model, seed: model(X, T[:, 0]))
    found = explain_fully(workload, plan_for(model, rules))
    rows = {row.site.removeprefix("blocks.0."): row for row in found.linears}
    assert set(rows) == {"modulation", "to_q", "to_k", "to_v", "to_out", "up", "down"}
    assert {name: row.operator for name, row in rows.items()} == {
        "modulation": "linear",
        **dict.fromkeys(("to_q", "to_k", "to_v"), "_int_mm"),
        "to_out": "decode, then linear",
        "up": "float32 product (simulated)",
        "down": "linear",
    }
    assert rows["modulation"].reason == "the plan names no format"
    assert rows["down"].reason.startswith("the CPU has no fp8 matrix product")
    assert rows["down"].format == ""
    # 64 x 64 in float32; then a byte for each weight and a float32 scale for each output channel.
    assert (rows["to_k"].bytes_before, rows["to_k"].bytes_after) == (64 * 64 * 4, 64 * 64 + 64 * 4)
    assert rows["to_out"].bytes_after == 64 * 64 // 2 + 64 * 2
    assert rows["up"].rows == 66
    whole = totals(found.linears)
    assert whole["before"] == 6 * 64 * 64 * 4
    assert 3.5 < whole["ratio"] < 5
    assert {"linears", "decisions"} == set(found.to_json())


@torch.no_grad()
def test_a_plan_without_formats_has_no_such_table() -> None:
    model = Model(blocks=1).eval()
    workload = Workload(model, lambda model, seed: model(X, T[:, 0]))
    found = explain_fully(workload, plan_for(model, {}))
    assert found.linears == []
    assert found.decisions

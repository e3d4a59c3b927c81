"""Plans with means, exact mass and orders by head on published architectures at odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt import fingerprint
from ditopt.layout import TokenLayout
from ditopt.patterns import Band, Clusters, ExactTopK, Skip, TwoMasks
from ditopt.plan import Block, Hardware, ModelRecord, Phase, Plan, Sampler, SiteRecord
from ditopt.plan.schema import MeanRemainder
from ditopt.torch_backend import Compiled, compiled_graphs

from .models import build, first_tensor
from .runs import relative_l2

pytestmark = pytest.mark.zoo

CASES = [("wan", (10, 6)), ("flux", (7, 9))]  # self-attention of a video; joint, text before


def compiled(
    model: nn.Module, arguments: dict[str, Any], plan: Plan | None = None
) -> tuple[Tensor, Compiled]:
    torch.compiler.reset()
    run = torch.compile(model, backend="ditopt_eager", options={"plan": plan} if plan else {})
    with torch.no_grad():
        out = first_tensor(run(**arguments)).clone()
    return out, compiled_graphs(model)[-1]


def plan_for(model: nn.Module, record: Compiled, **phase: Any) -> Plan:
    assert record.grid is not None
    grid = TokenLayout(*(int(size) for size in record.grid))
    sites = tuple(
        SiteRecord(id=site.id, kind=site.kind, heads=site.heads, head_dim=site.head_dim)
        for site in record.attention
    )
    return Plan(
        model=ModelRecord(
            architecture=fingerprint.architecture(model),
            weights=fingerprint.weights(model),
            name=type(model).__name__,
            sites=sites,
        ),
        sampler=Sampler(calls=1),
        hardware=Hardware(device="cpu", name="a CPU", torch=torch.__version__, threads=1),
        layout=grid,
        block=Block(q=16, k=16),
        phases=(Phase(calls=(0, 1), **phase),),
    )


@pytest.fixture(scope="module", params=CASES, ids=[name for name, _ in CASES])
def case(request: Any) -> tuple[nn.Module, dict[str, Any], Tensor, Compiled, list[str]]:
    name, hw = request.param
    model, arguments = build(name, hw=hw)
    with torch.no_grad():
        # Weights of a random model make attention flat: sharpen it.
        for path, parameter in model.named_parameters():
            if path.endswith(("norm_q.weight", "norm_k.weight")):
                parameter.mul_(3)
    dense, record = compiled(model, arguments)
    sites = [s.id for s in record.attention if s.kind != "cross" and s.mask == "none"]
    assert sites
    return model, arguments, dense, record, sites


def test_means_come_closer_than_dropping(case: Any) -> None:
    model, arguments, dense, record, sites = case
    heads = next(s.heads for s in record.attention if s.id == sites[0])
    patterns = (Band(window=8), *(Skip(),) * (heads - 1))
    attention = dict.fromkeys(sites, patterns)
    dropped, _ = compiled(model, arguments, plan_for(model, record, attention=attention))
    means = dict.fromkeys(sites, MeanRemainder())
    plan = plan_for(model, record, attention=attention, remainders=means)
    out, told = compiled(model, arguments, plan)
    assert 0 < relative_l2(out, dense) < relative_l2(dropped, dense)
    applied = [d.site for d in told.decisions if d.rule == "substitute_means" and d.applied]
    assert applied == sites


@pytest.mark.parametrize(
    "selector",
    [
        ExactTopK(density=0.4, adaptive=True),
        TwoMasks(pattern=Band(window=8), samples=8),
        Clusters(queries=4, keys=6, mass=0.6, first=4),
    ],
    ids=lambda selector: selector.kind,
)
def test_selectors_run_or_say_why_not(case: Any, selector: Any) -> None:
    model, arguments, dense, record, sites = case
    plan = plan_for(model, record, selectors=dict.fromkeys(sites, selector))
    out, told = compiled(model, arguments, plan)
    rule = "select_blocks_online" if selector.kind == "exact_top_k" else "select_head_orders"
    decisions = [d for d in told.decisions if d.rule == rule]
    assert [d.site for d in decisions] == sites
    text = any(s.kind == "joint" for s in record.attention)
    if selector.kind == "clusters" and text:
        assert not any(d.applied for d in decisions)
        assert "are text, which must always be kept" in decisions[0].reason
        assert relative_l2(out, dense) < 1e-5
    else:
        assert all(d.applied for d in decisions)
        assert 0 < relative_l2(out, dense) < 1

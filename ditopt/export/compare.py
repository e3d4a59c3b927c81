"""The last step of an export: the written engine against what it was made from.

Without a plan that is the model. With one it is the model with the plan, by the oracle, over a
whole sampling loop; in float32 only rounding may differ. 8-bit layers round what they read: where
two programs differ by one bit before them, a few numbers fall to the other neighbour, which moves
more of them in the next layer, until both hold rounding noise of their own. So such an engine is
measured by that noise: the distance between the model with the plan and the same plan without its
8-bit formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ditopt.errors import VerificationError
from ditopt.export.engine import Engine
from ditopt.export.recording import RecordedCall, record
from ditopt.export.verify import tolerance, worst_error
from ditopt.quantization.layer import ROW_FORMATS

if TYPE_CHECKING:
    from pathlib import Path

    from ditopt.export.door import Exported
    from ditopt.plan import Plan
    from ditopt.workload import Workload

SEED = 7000
"""Of the loop that the engine is checked on; no profile, search or bench uses it by default."""

NOISE = 1.5
"""Of the distance to the unrounded plan: two independent roundings are sqrt(2) of it apart."""


def compare_engine(
    folder: Path, workload: Workload, name: str, plan: Plan | None, exported: Exported
) -> float:
    """Largest relative error of an engine over calls whose results are known.

    Args:
        folder: the engine's.
        workload: gives the loop.
        name: of the denoiser.
        plan: that was built in.
        exported: what torch exported, with calls of the model.

    Raises:
        VerificationError: it is no rounding.
    """
    # What crosses the borders of programs is known for the size of the export only.
    engine = Engine.load(folder, verify_borders=exported.sizes is None)
    calls = exported.calls
    if plan is not None:
        calls = _calls_with_plan(workload, name, plan, exported)
    errors = []
    allowed = [tolerance(call.result) for call in calls]
    if plan is not None and _rounds_inputs(plan):
        exact = _results(workload, name, _without_formats(plan), calls)
        noise = (worst_error(call.result, x) for call, x in zip(calls, exact, strict=True))
        allowed = [max(a, NOISE * n) for a, n in zip(allowed, noise, strict=True)]
    with torch.no_grad():
        for number, (call, most) in enumerate(zip(calls, allowed, strict=True)):
            errors.append(worst_error(engine(*call.args, **call.kwargs), call.result))
            if errors[-1] > most:
                raise VerificationError(
                    f"the engine is wrong at call {number}: relative error {errors[-1]:.2g}, "
                    f"at most {most:.2g} is rounding",
                    remedy="Nothing was written. Please report the model and the plan.",
                )
    return max(errors)


def _rounds_inputs(plan: Plan) -> bool:
    rules = (rule for phase in plan.phases for rule in phase.linear.values())
    return any(rule.format in ROW_FORMATS for rule in rules)


def _without_formats(plan: Plan) -> Plan:
    phases = tuple(phase.model_copy(update={"linear": {}}) for phase in plan.phases)
    return plan.model_copy(update={"phases": phases})


def _calls_with_plan(
    workload: Workload, name: str, plan: Plan, exported: Exported
) -> Sequence[RecordedCall]:
    """A whole sampling loop of the model with the plan, and calls at the other open sizes."""
    torch.compiler.reset()
    calls = list(record(workload, name, seed=SEED, model=_compiled(workload, name, plan)))
    if exported.sizes is not None:
        results = _results(workload, name, plan, exported.calls)
        pairs = zip(exported.calls, results, strict=True)
        calls += [RecordedCall(call.args, call.kwargs, result) for call, result in pairs]
    torch.compiler.reset()
    return calls


def _results(workload: Workload, name: str, plan: Plan, calls: Sequence[RecordedCall]) -> list[Any]:
    """What the model with a plan returns for these calls, one after the other."""
    torch.compiler.reset()
    compiled = _compiled(workload, name, plan)
    with torch.no_grad():
        results = [compiled(*call.args, **call.kwargs) for call in calls]
    torch.compiler.reset()
    return results


def _compiled(workload: Workload, name: str, plan: Plan) -> Any:
    options: Any = {"plan": plan}
    return torch.compile(workload.models[name], backend="ditopt_eager", options=options)

"""Published quantizations of linear layers, as recipes, on the trained model.

    python benchmarks/quantization_recipes.py --output FILE --work FOLDER

Layers of the embedded video model are profiled, codebooks are calibrated on its own trajectory, and
each recipe's plan samples the audit seeds. Clips, profile and codebooks in `--work` are taken up
again, and so is the output (benchmarks/results/quantization_recipes_cpu.json). Steps and rates of
the calibration fit a CPU and are part of the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # modules beside this one must not hide the standard library's
    sys.path.append(sys.path.pop(0))

import torch
from stored_weights import CALLS, MIN_ROWS, Bench

from ditopt.environment import describe_environment
from ditopt.plan import Block
from ditopt.profiling.linears import LinearProfile, load_statistics, profile_linears
from ditopt.profiling.schema import Profile
from ditopt.quantization import LinearRule
from ditopt.quantization.block_calibration import Calibration, blocks_of, calibrate
from ditopt.quantization.plans import uniform_plan
from ditopt.recipes import QuantizationRecipe

if TYPE_CHECKING:
    from ditopt.plan import Plan

RECORDED_STEPS = 5
"""Of the trajectory that blocks are recorded on: the sampler's own, in fewer steps."""
SETTINGS: dict[str, dict[str, Any]] = {
    "vidit_q": {"per_range": False},
    "lrq_dit": {},
    "vq4dit": {"steps": 20, "words_rate": 1e-3, "ratio_rate": 0.3},
}
RECORDED_CALLS = 4


def profiled(bench: Bench, folder: Path) -> tuple[Profile, LinearProfile]:
    """The layers' profile, with what a plan needs of the model's own."""
    found = LinearProfile.load(folder)
    if found is None:
        names = [name for name in SETTINGS if name != "vq4dit"]
        rules = [QuantizationRecipe.load(n).candidates(SETTINGS[n]) for n in names]
        found = profile_linears(
            bench.workload,
            folder,
            rules=[*itertools.chain(*rules)],
            rows=64,
            min_rows=MIN_ROWS,
            measure=lambda *_: (),
        )
    plain = uniform_plan(bench.model, bench.graph, LinearRule(format="int8_row"), [], calls=CALLS)
    profile = Profile.model_validate(
        {
            "model": plain.model,
            "sampler": plain.sampler,
            "hardware": plain.hardware,
            "layout": None,
            "block": Block(),
            "options": [{"pattern": {"kind": "dense"}}],
            "shapes": {},
            "observed_calls": [0],
            "data_range": bench.workload.data_range,
            "seeds": [0],
            "finished": [0],
        }
    )
    return profile, found


def codebooks(bench: Bench, settings: Calibration, folder: Path) -> tuple[Any, Any]:
    """Calibrated tensors and what became of each block, kept in the work folder."""
    path = folder / "codebooks.pt"
    if not path.exists():
        blocks = blocks_of(bench.graph, bench.sites)
        tensors, told = calibrate(
            # Loading the demo's workload has made its package known.
            importlib.import_module("tiny_video.workload").workload(steps=RECORDED_STEPS),
            blocks,
            settings,
            calls=RECORDED_CALLS,
            progress=lambda what, done, whole: print(what, done, whole, flush=True),
        )
        torch.save((tensors, [dataclasses.asdict(one) for one in told]), path)
    tensors, told = torch.load(path)
    return tensors, told


def chosen(plan: Plan) -> dict[str, float]:
    """Share of the calls at which a layer has each rule, summed over layers."""
    count: Counter[str] = Counter()
    for phase in plan.phases:
        for rule in phase.linear.values():
            said = (rule.format, rule.activation, rule.transform)
            words = ", ".join(word for word in said if word != "none")
            count[words] += phase.calls[1] - phase.calls[0]
    return {words: calls / CALLS for words, calls in sorted(count.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    options = parser.parse_args()
    result: dict[str, Any] = {"recipes": {}}
    if options.output.exists():
        result |= json.loads(options.output.read_text())
    with torch.no_grad():
        bench = Bench(options.work, options.seeds)
        profile, linears = profiled(bench, options.work / "linears")
        device = next(bench.model.parameters()).device
        result |= {"environment": describe_environment(device), "seeds": list(bench.seeds)}
        result["fluctuation"] = sorted(g.outliers["fluctuation"] for g in linears.groups)
        for name in options.only:
            recipe, setting = QuantizationRecipe.load(name), SETTINGS[name]
            row = result["recipes"].setdefault(name, {"setting": setting, "psnr_db": {}})
            tensors: Any = load_statistics(options.work / "linears")
            if name == "vq4dit":
                rule: Any = recipe.rule_with(setting)
                tensors, row["blocks"] = codebooks(bench, rule.calibration(), options.work)
                row |= {"recorded_calls": RECORDED_CALLS, "recorded_steps": RECORDED_STEPS}
            plan = recipe.plan(profile, linears, setting, tensors=tensors)
            row["layers"] = chosen(plan)
            for seed in bench.seeds:
                if str(seed) not in row["psnr_db"]:
                    row["psnr_db"][str(seed)], row["smaller"] = bench.measure(plan, seed)
                print(name, row, flush=True)
                options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Run an engine with nothing but torch: neither ditopt nor the model's source is needed.

    python run.py ENGINE calls.safetensors results.safetensors

`calls.safetensors` holds the inputs of each call, named `<call>.<input>` (`0.hidden_states`); the
results come as `<call>.<number>`. Calls are those of one sampling run of one guidance branch, in
order. An engine's programs are native code: run only engines that you trust.

It does what `ditopt.Engine` does, in the open: load weights and programs, and for each call either
run the block stack or forecast its output, as the schedule says. Files are not checked here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Engine:
    """An engine's folder."""

    def __init__(self, folder: Path) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        self.wiring = self.manifest["wiring"]
        if (self.manifest["schedule"] or {}).get("gated"):
            raise SystemExit("the engine's plan has a gate: ditopt.Engine runs it")
        self.device = torch.device(self.manifest["device"])
        self.weights = {
            name: self._place(value, self.manifest["tensors"][name])
            for name, value in load_file(str(folder / "weights.safetensors")).items()
        }
        self.programs = [
            torch._C._aoti.AOTIModelPackageLoader(
                str(folder / program["file"]), "model", False, 1, -1
            )
            for program in self.manifest["programs"]
        ]
        self.stored: dict[int, list[Tensor]] = {}

    def _place(self, value: Tensor, spec: dict[str, Any]) -> Tensor:
        """The tensor on the device, with the strides that the programs were compiled for."""
        placed = torch.empty_strided(
            spec["shape"], spec["stride"], dtype=value.dtype, device=spec["device"]
        )
        return placed.copy_(value)

    def steps(self, steps: list[dict[str, Any]], env: list[Any]) -> None:
        """Run programs; each reads and writes slots of the environment."""
        for step in steps:
            inputs = [self.weights[i] if isinstance(i, str) else env[i] for i in step["inputs"]]
            results = self.programs[step["program"]].boxed_run(inputs)
            for slot, value in zip(step["outputs"], results, strict=True):
                env[slot] = value

    def call(self, number: int, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Call `number` of a sampling run."""
        wiring, schedule = self.wiring, self.manifest["schedule"]
        env: list[Any] = [None] * wiring["slots"]
        for slot, item in enumerate(self.manifest["call"]["inputs"]):
            env[slot] = self._place(inputs[item["name"]], item["spec"])
        sources = schedule["sources"][number] if schedule else []
        phase = schedule["phases"][number] if schedule else 0
        for kept in wiring["kept_always"] if sources else wiring["kept_by_phase"][phase]:
            self.steps(wiring["kept"][kept]["steps"], env)
        self.steps(wiring["before"], env)
        stack = wiring["stack"]
        if sources:
            self._forecast(sources, stack, env)
        else:
            bases = (
                [None if base is None else env[base] for base in stack["bases"]] if stack else []
            )
            self.steps(wiring["bodies"][phase], env)
            if stack and self.manifest["cached"]:
                outputs = [env[slot] for slot in stack["outputs"]]
                self.stored[number] = [
                    out.clone() if base is None else out - base
                    for out, base in zip(outputs, bases, strict=True)
                ]
                self.like = outputs
        self.steps(wiring["after"], env)
        return [env[slot] for slot in wiring["returned"]]

    def _forecast(self, sources: list[Any], stack: dict[str, Any], env: list[Any]) -> None:
        """The stack's outputs: base plus weighted residuals of earlier full calls, in fp32."""
        for k, (slot, base) in enumerate(zip(stack["outputs"], stack["bases"], strict=True)):
            like = self.like[k]
            total = (
                torch.zeros(like.shape, device=like.device) if base is None else env[base].float()
            )
            for call, weight in sources:
                total = total + weight * self.stored[call][k].float()
            env[slot] = torch.empty_like(like).copy_(total)


def main() -> None:
    """Run the calls of a file."""
    folder, calls, out = map(Path, sys.argv[1:4])
    engine, given = Engine(folder), load_file(str(calls))
    results = {}
    for number in range(1 + max(int(name.split(".", 1)[0]) for name in given)):
        prefix = f"{number}."
        inputs = {n.removeprefix(prefix): v for n, v in given.items() if n.startswith(prefix)}
        for k, value in enumerate(engine.call(number, inputs)):
            results[f"{prefix}{k}"] = value.cpu().contiguous()
    save_file(results, str(out))
    print(f"{len(results)} results of {engine.manifest['name']}, written to {out}")


if __name__ == "__main__":
    main()

"""Every architecture of the tests' zoo through `backend="ditopt"`: graphs and distance to eager.

    python benchmarks/zoo.py                            # all 22, about an hour on two cores
    python benchmarks/zoo.py wan flux --output out.json

For each model: graphs compiled at each call of a sequence (two timesteps, four resolutions, batch
2), the same for a backend that runs Dynamo's graphs as they are, and the distance (relative L2) to
eager in float32. Results are written after each model; models already in the file are kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ditopt.environment import describe_environment  # noqa: E402
from ditopt.files import write_text  # noqa: E402
from tests.zoo.compiled import full_sequence, go  # noqa: E402
from tests.zoo.models import ZOO  # noqa: E402

TOLERANCE = 1e-5


def measure(name: str) -> dict[str, Any]:
    """One row, or the error in its place: one failure must not hide the other models."""
    try:
        outcome = go(name, full_sequence(name))
    except Exception as error:
        return {"model": name, "error": f"{type(error).__name__}: {error}"[:500], "passed": False}
    passed = outcome.as_many_graphs and max(outcome.relative_l2) <= TOLERANCE
    return {**outcome.to_json(), "passed": passed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(ZOO), help="names; all by default")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/zoo_cpu.json")
    arguments = parser.parse_args()
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")
    }
    rows: dict[str, Any] = {}
    if arguments.output.exists():
        rows = {row["model"]: row for row in json.loads(arguments.output.read_text())["rows"]}
    for name in arguments.models:
        row = rows[name] = measure(name)
        worst = max(row.get("relative_l2", [float("nan")]))
        print(f"{name:16} graphs {row.get('graphs')} worst {worst:.1e} passed {row['passed']}")
        result = {
            "environment": {**describe_environment(torch.device("cpu")), "versions": versions},
            "backend": "ditopt",
            "dtype": "float32",
            "tolerance": TOLERANCE,
            "rows": [rows[model] for model in ZOO if model in rows],
        }
        write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Write the README's tables from the JSON under benchmarks/results/: `make docs`.

Taken up is each file that `ditopt bench --json` or `ditopt demo --json` wrote.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
COLUMNS = ("variant", "time (IQR)", "vs `torch.compile`", "PSNR (worst seed)", "SSIM", "compile")
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def row_text(row: dict[str, Any], inductor_ms: float) -> str:
    """One line of a table."""
    quality = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
    if row.get("psnr_min_db") is not None:
        quality += f" ({row['psnr_min_db']:.1f})"
    time = f"{row['ms'] / 1e3:.2f} s ({row['ms_iqr'] / 1e3:.2f})"
    speedup = f"{inductor_ms / row['ms']:.2f}x"
    cells = (
        row["variant"],
        time,
        speedup,
        quality,
        f"{row['ssim']:.3f}",
        f"{row['compile_s']:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def table_text(path: Path, result: dict[str, Any]) -> str:
    """One recorded bench as a titled table."""
    where = result["environment"]
    inductor_ms = next(row["ms"] for row in result["rows"] if row["variant"] == "inductor")
    title = f"**{where['workload']}**, one sampling loop on {where['name']}"
    facts = f"{where['threads']} threads, torch {where['torch']}, {where['date']}, `{path.name}`"
    rows = "\n".join(row_text(row, inductor_ms) for row in result["rows"])
    return f"{title} ({facts}):\n\n{HEADER}\n{rows}\n"


def is_bench(result: Any) -> bool:
    """Whether a JSON value is a bench whose gate was green."""
    rows = result.get("rows", []) if isinstance(result, dict) else []
    variants = [row.get("variant") for row in rows if isinstance(row, dict)]
    return "inductor" in variants and all(row.get("ms") for row in rows)


def readme_text() -> str:
    """The README with its tables as the results say."""
    results = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    tables = [table_text(path, result) for path, result in results.items() if is_bench(result)]
    text = "\n".join(tables) or "Nothing is recorded yet.\n"
    return PLACE.sub(lambda place: place[1] + text + place[2], README.read_text())


if __name__ == "__main__":
    README.write_text(readme_text())

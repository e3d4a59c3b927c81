"""What several commands share: arguments, options, and how a result is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from ditopt.files import check_writable, write_json

_MIN_WIDTH = 120  # columns; narrower tables would break every number in two


def can_be_written(path: Any) -> Any:
    """Refuse a file whose folder is missing now, not after minutes of work."""
    if path is not None and str(path) != "-":
        check_writable(path)
    return path


WorkloadSpec = Annotated[
    str,
    typer.Argument(
        metavar="WORKLOAD", help="path/to/file.py[:function] or diffusers:PATH", show_default=False
    ),
]
ProfileDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="What `ditopt profile` wrote.", show_default=False)
]
JsonPath = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="PATH",
        help="Write the result as JSON; - for standard output.",
        callback=can_be_written,
    ),
]
PlanPath = Annotated[Path, typer.Option("--plan", metavar="FILE", help="The plan to apply.")]
EnginePath = Annotated[
    Path | None,
    typer.Option("--engine", metavar="DIR", help="An engine that `ditopt export` wrote."),
]
Sha256 = Annotated[
    str | None,
    typer.Option("--expect-sha256", metavar="HEX", help="sha256 of the engine's manifest."),
]


def show(table: RenderableType, value: Any, json_path: str | None) -> None:
    """Print the table, and write the JSON where it was asked for."""
    if json_path == "-":
        typer.echo(json.dumps(value, indent=2, allow_nan=False))
        return
    console = Console()
    console.width = max(console.width, _MIN_WIDTH)
    console.print(table)
    if json_path is not None:
        write_json(json_path, value)

"""The command line: one function per command, in files by what the commands are about.

Every command prints a table; `--json PATH` writes the same as JSON (`-` for standard output, and
then nothing else goes there). Bad input ends with one line that says what is wrong, and code 2.
Commands import what they need when they run, so that `ditopt --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from ditopt.cli import engines, measured, planning, profiles, recipes, reports
from ditopt.cli.entry import run_app

app = typer.Typer(
    help="Profile a Diffusion Transformer, plan its optimization, apply and measure the plan.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

_COMMANDS: tuple[Callable[..., Any], ...] = (  # as `ditopt --help` lists them
    profiles.inspect,
    profiles.profile,
    profiles.merge,
    planning.plan,
    recipes.recipe,
    planning.explain,
    reports.report,
    engines.export,
    engines.run,
    measured.bench,
    measured.demo,
)
for _command in _COMMANDS:
    app.command()(_command)


def main() -> None:
    """Entry point of the `ditopt` command."""
    run_app(app)

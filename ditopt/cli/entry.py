"""How a command ends: warnings on one line, errors of ditopt on one line with code 2."""

from __future__ import annotations

import sys
import warnings

import typer

from ditopt.errors import DitoptError, DitoptWarning

_python_format = warnings.formatwarning


def run_app(app: typer.Typer) -> None:
    """Run the command that the process's arguments name."""
    warnings.formatwarning = format_warning
    try:
        app()
    except Exception as error:
        cause = find_cause(error)
        if cause is None:
            raise
        typer.echo(f"ditopt: {cause}", err=True)
        sys.exit(2)


def find_cause(error: BaseException | None) -> DitoptError | None:
    """The DitoptError inside `error`: Dynamo wraps what a backend raises in an error of its own."""
    while error is not None and not isinstance(error, DitoptError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


def format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Warnings of ditopt on one line without a source position; others as Python prints them."""
    if issubclass(category, DitoptWarning):
        return f"warning: {message}\n"
    return _python_format(message, category, filename, lineno, line)

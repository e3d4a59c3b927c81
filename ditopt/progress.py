"""How long work reports its progress: one plain callable, so that nothing depends on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""`progress(task, done, total)`: `done` of `total` units of the named task are finished.

A total of 0 is unknown beforehand.
"""

LOG_INTERVAL_S = 5.0
"""Where there is no terminal, at most one line of progress in this time."""


def silent(task: str, done: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """Progress on standard error: bars that vanish on a terminal, a line now and then in a log."""
    from rich.console import Console  # only the terminal needs it
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _log_lines(console.print)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        tasks = {}

        def report(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total or None)
            bars.update(tasks[task], completed=done, total=total or None)

        yield report


def _log_lines(write: Callable[[str], None]) -> Progress:
    last = time.monotonic()

    def report(task: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_INTERVAL_S:
            write(f"{task}: {done} of {total or 'unknown'}")
            last = time.monotonic()

    return report

"""Exception and warning types of ditopt.

Every message names what was expected, what came instead and, as `remedy`, what to do. The command
line prints `str(error)` and exits with code 2, so the text is always a single line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DitoptError(Exception):
    """Base of every error that ditopt raises on purpose.

    Args:
        message: what was expected and what came, in one sentence.
        remedy: what the reader can do about it, in one sentence.
    """

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        text = self.message if self.remedy is None else f"{self.message.rstrip('.')}. {self.remedy}"
        return " ".join(text.split())


class ConfigError(DitoptError):
    """An option or a `DITOPT_*` variable has an unknown name or a bad value."""


class WorkloadError(DitoptError):
    """A workload cannot be loaded, or its sampling loop does not do what a workload must do."""


class CaptureError(DitoptError):
    """A model's graph cannot be captured, or an observed fact about it cannot be established."""


class ProfileError(DitoptError):
    """A profile cannot be measured, written or read."""


class PlanError(DitoptError):
    """A plan is malformed, names something unknown, or belongs to another model."""


class WeightError(DitoptError):
    """A weight cannot be rounded to the format that the plan names."""


class GoalUnattainable(DitoptError):
    """No plan meets the goal; the message states what is attainable."""


class EngineError(DitoptError):
    """An engine cannot be exported or loaded, or was called with inputs it was not made for."""


class BackendUnavailable(DitoptError):
    """A backend or an optional package is missing; the remedy is the exact install line."""


class FileError(DitoptError):
    """A file cannot be read or written; whatever was there before is untouched."""


class VerificationError(DitoptError):
    """A result failed a correctness gate, so numbers that depend on it are withheld."""


class StrictModeError(DitoptError):
    """Strict mode turned a fallback or a doubt into an error."""


class DitoptWarning(UserWarning):
    """Something works, but with less than was asked for; the message says what is lost."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names closest to `name` as a sentence, or all of them where none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(match) for match in close)}?"
    return f"Known names: {', '.join(names)}." if names else "There are none."

"""`session(key)`: the user names a sampling run, so that it need not be recognised."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from ditopt.errors import DitoptError


class SessionError(DitoptError):
    """Sessions are used in a way that leaves the sampling run ambiguous."""


@dataclass(frozen=True)
class Session:
    """The sampling run that the current thread or task works on; see `session`.

    Attributes:
        key, branch, calls: as the user gave them.
        implied: nobody gave them, see `implied_session`.
    """

    key: Hashable
    branch: Hashable | None = None
    calls: int | None = None
    implied: bool = False


class KeepsTrajectories(Protocol):
    """Something that holds state per session key."""

    def forget(self, key: Hashable) -> None:
        """Drop what is stored for a key; unknown keys are fine."""


_current: ContextVar[Session | None] = ContextVar("ditopt_session", default=None)
_keepers: weakref.WeakSet[KeepsTrajectories] = weakref.WeakSet()


def current_session() -> Session | None:
    """The session of this thread or asyncio task, if any."""
    return _current.get()


def on_session_end(keeper: KeepsTrajectories) -> None:
    """Tell `keeper`, held weakly, whenever a key's sampling run is over."""
    _keepers.add(keeper)


@contextmanager
def session(
    key: Hashable | None = None, *, branch: Hashable | None = None, calls: int | None = None
) -> Iterator[None]:
    """Everything called inside belongs to the sampling run named `key`.

    One `with` block may hold the whole run, or one step of it: entering a key again continues its
    run, which is how a server interleaves requests. A run ends when it has made all of the plan's
    calls, when an exception leaves the block, or, without a key, with the block.

    Args:
        key: name of the run, not in use by another one; None makes a run of this block alone.
        branch: name of the guidance branch that the block's calls belong to; only needed where a
            wrapper rebuilds the conditioning tensors at each call, which identify it otherwise.
        calls: how many calls per branch, of each denoiser, the run makes. Stating it saves the two
            reads of an accelerator's timestep by which each branch is otherwise checked against the
            plan.

    Raises:
        SessionError: inside another session of the same thread or task.
    """
    outer = _current.get()
    if outer is not None and not outer.implied:
        raise SessionError(
            f"session({key!r}) is entered inside session({outer.key!r})",
            remedy="Leave the outer session first: a call belongs to exactly one sampling run.",
        )
    name = object() if key is None else key
    with _entered(Session(name, branch, calls), over=key is None):
        yield


@contextmanager
def implied_session() -> Iterator[None]:
    """A session for one sampling loop that is known to be one, such as a workload's.

    A session that is open already stays, and one that the loop opens itself takes its place.
    """
    if _current.get() is not None:
        yield
        return
    with _entered(Session(object(), implied=True), over=True):
        yield


@contextmanager
def _entered(session: Session, *, over: bool) -> Iterator[None]:
    """`session` is the current one; `over`: its run ends with the block, not with an error only."""
    token = _current.set(session)
    try:
        yield
    except BaseException:
        over = True
        raise
    finally:
        _current.reset(token)
        if over:
            for keeper in tuple(_keepers):
                keeper.forget(session.key)

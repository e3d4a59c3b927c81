"""`TrajectoryTracker`: which sampling run, guidance branch and call a call of the model is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditopt.runtime.doubts import Doubt
from ditopt.runtime.inputs import InputRoles, identify, lease, read_timestep
from ditopt.runtime.notices import Notices
from ditopt.runtime.placement import Arrival, place
from ditopt.runtime.session import Session, current_session, on_session_end
from ditopt.runtime.trajectory import Branch, Trajectory

if TYPE_CHECKING:
    from ditopt.runtime.schedule import StepSchedule

# First key of runs that a session names; the others begin with a thread's number.
_SESSION = "session"

# Calls in a row that each look like a new run before the user is told that none is recognised.
_STRANGERS_BEFORE_NOTICE = 3


@dataclass(slots=True)
class Step:
    """Where one call stands.

    Attributes:
        call: index within the plan's calls, None when it is not known.
        phase: the plan's phase; phase 0, the careful one, when the call is not known for sure.
        doubt: why stored residuals must neither be used nor written; None when they may.
        branch: owner of the stored residuals; None when the call belongs to no known run.
        run: the branch's sampling run.
    """

    call: int | None
    phase: int
    doubt: Doubt | None = None
    branch: Branch | None = None
    run: Trajectory | None = None


class TrajectoryTracker:
    """Recognises sampling runs and guidance branches of one model.

    A branch is identified by its step-invariant tensors (storage, view and version). Outside a
    session the timestep of each call must be the one that the plan expects next; any surprise means
    full compute until one whole run has passed as planned. Inside `session(key)` calls are counted;
    a timestep on an accelerator is then read only at a branch's first two calls (not at all with
    `session(key, calls=T)`) and when a branch lags, comes back or appears in mid-run.

    Runs that share their very prompt tensors, in one thread and without sessions, cannot be told
    apart by inputs. They are noticed by the order of their timesteps, and computed in full.

    One tracker serves all compiled callables of a model, so that a change of batch size or
    resolution in mid-run, which compiles another one, does not lose the position.

    Args:
        schedule: the plan's calls.
        model: name for messages, which `notices` collects.
        capacity: sampling runs kept at once, least recently used first to go. Outside a session
            each guidance branch counts as a run.
    """

    def __init__(self, schedule: StepSchedule, *, model: str = "model", capacity: int = 16) -> None:
        self.schedule = schedule
        self.notices = Notices(model)
        self._capacity = capacity
        self._runs: OrderedDict[Hashable, Trajectory] = OrderedDict()
        self._lock = threading.Lock()
        self._strangers = 0
        on_session_end(self)

    def locate(self, inputs: Sequence[Any], roles: InputRoles, scope: Hashable) -> Step:
        """Find a call's position. `advance` or `abandon` must follow.

        Args:
            inputs: the compiled callable's arguments.
            roles: what they mean.
            scope: identifies the compiled callable.
        """
        session = current_session()
        seen = identify(inputs, roles)
        timestep = None
        if roles.timestep is not None and self.schedule.timesteps is not None:
            timestep = inputs[roles.timestep]
        if session is None and seen.versions is None:
            return self._unowned(timestep)
        if session is None:
            name: Hashable = (scope, seen.shapes, seen.views)
            key: Hashable = (threading.get_ident(), name)
        else:
            name = (scope, seen.shapes, seen.views if session.branch is None else session.branch)
            key = (_SESSION, session.key)
        with self._lock:
            run = self._run(key)
            branch, certain = self._branch(run, name, session)
            if branch is not None and branch.next == self.schedule.calls:
                run.restart()  # the plan's calls are done: this is the first call of another run
                branch = None
            arrival = Arrival(session, name, timestep, branch is None, certain)
            if branch is None:
                named = session is not None and session.branch is not None
                branch = Branch(seen, () if named else lease(inputs, roles))
                run.welcome(name, branch)
            elif branch.identity != seen:
                if branch.identity.weights != seen.weights:
                    branch.drop_residuals(Doubt.WEIGHTS_CHANGED)
                elif certain and branch.identity.versions != seen.versions:
                    branch.drop_residuals(Doubt.INPUTS_CHANGED)
                branch.identity = seen
            call = place(self.schedule, run, branch, arrival, self.notices)
            if session is None:
                self._note_stranger(arrival.new, call)
            # A restarted run is at the position it says; the other doubts leave the plan.
            known = call if run.doubt in (None, Doubt.RESTARTED) else None
            return Step(call, self.schedule.phase_of(known), run.doubt, branch, run)

    def advance(self, step: Step) -> None:
        """The call at `step` has succeeded."""
        if step.branch is not None and step.run is not None and step.call is not None:
            with self._lock:
                step.run.advance(step.branch, step.call, self.schedule.calls)

    def abandon(self, step: Step) -> None:
        """The call at `step` has raised: nothing that its run has stored is used again."""
        if step.branch is None or step.run is None:
            return
        with self._lock:
            if step.run.doubt is not None:
                step.branch.whole = False
            else:
                # Not `restart`: within a session the same call may be tried again in mid-run.
                step.run.branches.clear()
                step.run.leader = None

    def forget(self, key: Hashable) -> None:
        """Drop the run of a session's key."""
        with self._lock:
            self._runs.pop((_SESSION, key), None)

    def clear(self) -> None:
        """Drop all stored residuals; runs in progress go on in full until they have new ones."""
        with self._lock:
            for run in self._runs.values():
                for branch in run.branches.values():
                    branch.drop_residuals(Doubt.WEIGHTS_CHANGED)

    def _run(self, key: Hashable) -> Trajectory:
        run = self._runs.get(key)
        if run is not None:
            self._runs.move_to_end(key)
            return run
        for other in [key for key, run in self._runs.items() if _is_over(key, run)]:
            del self._runs[other]
        run = self._runs[key] = Trajectory()
        if len(self._runs) > self._capacity:
            self._runs.popitem(last=False)
        return run

    def _branch(
        self, run: Trajectory, name: Hashable, session: Session | None
    ) -> tuple[Branch | None, bool]:
        branch = run.branches.get(name)
        if branch is not None or session is None or session.branch is not None:
            return branch, True
        if self.schedule.branches > 1 or len(run.branches) != 1:
            return None, True
        # The plan has one branch and the session names the run: the conditioning was rebuilt.
        ((other, only),) = run.branches.items()
        same_program = (
            isinstance(other, tuple) and isinstance(name, tuple) and other[:2] == name[:2]
        )
        return (only, False) if same_program else (None, True)

    def _unowned(self, timestep: Any) -> Step:
        """Inference tensors outside a session: nothing can be stored, phases still apply."""
        if self.schedule.skips:
            self.notices.inference_tensors()
        call = None
        if timestep is not None and len(self.schedule.phases) > 1:
            value = read_timestep(timestep)
            call = None if value is None else self.schedule.find(value)
        return Step(call, self.schedule.phase_of(call), Doubt.INFERENCE_TENSORS)

    def _note_stranger(self, new: bool, call: int | None) -> None:
        if not new:
            self._strangers = 0
        elif call and self.schedule.skips:
            self._strangers += 1
            if self._strangers == _STRANGERS_BEFORE_NOTICE:
                self.notices.strangers(self._capacity)


def _is_over(key: Hashable, run: Trajectory) -> bool:
    """Whether a run outside a session cannot continue, because its inputs were freed."""
    named = isinstance(key, tuple) and key[0] == _SESSION
    return not named and all(branch.expired for branch in run.branches.values())

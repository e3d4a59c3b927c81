"""`place`: which of the plan's calls a call is, by counting or by its timestep."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditopt.runtime.doubts import Doubt
from ditopt.runtime.inputs import on_host, read_timestep

if TYPE_CHECKING:
    from ditopt.runtime.notices import Notices
    from ditopt.runtime.schedule import StepSchedule
    from ditopt.runtime.session import Session
    from ditopt.runtime.trajectory import Branch, Trajectory


@dataclass(slots=True)
class Arrival:
    """A call that is to be placed.

    Attributes:
        session: that it is made in, if any.
        name: of its branch within the run.
        timestep: the model's timestep input; None when the plan knows no timesteps.
        new: the branch is seen for the first time.
        certain: the branch is known by its inputs or its name, and not inferred.
    """

    session: Session | None
    name: Hashable
    timestep: Any
    new: bool
    certain: bool


def place(
    schedule: StepSchedule, run: Trajectory, branch: Branch, arrival: Arrival, notices: Notices
) -> int | None:
    """The call's index; None when it is none of the plan's calls, or nobody can tell which.

    Whatever does not fit leaves a doubt on the run, which keeps it from using stored residuals.
    """
    session = arrival.session
    if session is not None and session.calls not in (None, schedule.calls):
        run.distrust(Doubt.CALLS_DIFFER, branch)
        notices.off_plan(f"the session makes {session.calls} calls, not {schedule.calls}")
    if arrival.timestep is None:
        return _place_by_count(schedule, run, branch, arrival)
    # A run may begin in its middle (image to image) or have another grid: two looks tell.
    unsettled = session is None or (session.calls is None and branch.seen < 2)
    if not (on_host(arrival.timestep) or unsettled or _miscounted(schedule, run, branch, arrival)):
        return branch.next
    branch.recheck = False
    timestep = read_timestep(arrival.timestep)
    if timestep is None:
        run.distrust(Doubt.MIXED_TIMESTEPS, branch)
        return None
    if not arrival.new and schedule.matches(branch.next, timestep):
        return branch.next
    call = schedule.find(timestep, near=max(run.step, 0))
    if call is None or not arrival.new:
        _face_surprise(run, branch, arrival, call, timestep, notices)
    elif call == 0 and run.step > 0:
        # New inputs at the first timestep: the session's previous run has stopped early.
        run.restart()
        run.welcome(arrival.name, branch)
    return call


def _place_by_count(
    schedule: StepSchedule, run: Trajectory, branch: Branch, arrival: Arrival
) -> int | None:
    if arrival.session is None:
        run.distrust(Doubt.NO_TIMESTEP, branch)
        return None
    if _miscounted(schedule, run, branch, arrival):
        run.distrust(Doubt.POSITION_UNKNOWN, branch)
        return None
    return branch.next


def _miscounted(schedule: StepSchedule, run: Trajectory, branch: Branch, arrival: Arrival) -> bool:
    """Whether the number of calls so far may not be the position, though a session names the run.

    Branches take turns: one that lags behind the others has left some calls out, and so may any
    branch when another one takes the lead.
    """
    if not arrival.certain:
        return True
    if arrival.new:
        sibling = run.step == 0 and run.arrived <= schedule.branches
        return not (run.fresh or sibling)
    return branch.recheck or branch.next < run.step


def _face_surprise(
    run: Trajectory,
    branch: Branch,
    arrival: Arrival,
    call: int | None,
    timestep: float,
    notices: Notices,
) -> None:
    """The timestep is not the next one: explain it or leave a doubt."""
    trusted = run.doubt is None
    named = arrival.session is not None and arrival.certain
    if trusted and named and call in (run.step, run.step + 1) and branch.next < call:
        branch.drop_residuals(Doubt.JOINED_LATE)  # guidance was off for a while
    elif call == 0:
        run.distrust(Doubt.RESTARTED, branch)
    else:
        run.distrust(Doubt.TIMESTEP_MISMATCH, branch)
        if trusted:
            notices.off_plan(
                f"call {branch.next} has timestep {timestep:g}, not in the plan's order"
            )

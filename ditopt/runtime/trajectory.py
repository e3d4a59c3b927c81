"""What is kept per sampling run: its guidance branches, their positions and stored residuals."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ditopt.kernels.block_selection.reuse import Kept
from ditopt.runtime.doubts import Doubt

if TYPE_CHECKING:
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef

    from ditopt.runtime.inputs import Identity


# Guidance has two to four branches. More appear when a wrapper rebuilds the prompt at each call;
# residuals stored for such branches are never read.
_BRANCHES_PER_RUN = 8


@dataclass(slots=True, eq=False)
class Branch:
    """One guidance branch of one sampling run.

    Attributes:
        identity: what its last call looked like.
        leases: keep the addresses in `identity` from being reused.
        next: the call that is expected next; T when the run is over.
        residuals: full call -> one tensor per output of the block stack.
        kept: what selectors keep from call to call.
        gap: why residuals that the schedule counts on may be missing.
        seen: number of calls so far.
        whole: whether it has followed the plan from call 0 on without interruption.
        recheck: the position was called into question; read the timestep at the next call.
    """

    identity: Identity
    leases: tuple[StorageWeakRef, ...]
    next: int = 0
    residuals: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    gap: Doubt = Doubt.JOINED_LATE
    seen: int = 0
    whole: bool = False
    recheck: bool = False

    def drop_residuals(self, gap: Doubt) -> None:
        """Forget what was stored, and remember why."""
        self.residuals.clear()
        self.kept.clear()
        self.gap = gap

    @property
    def expired(self) -> bool:
        """Whether a tensor that identifies the branch was freed, so that it cannot come back."""
        return any(lease.expired() for lease in self.leases)  # type: ignore[no-untyped-call]


@dataclass(slots=True, eq=False)
class Trajectory:
    """One sampling run.

    Attributes:
        branches: by name or identity, and by the compiled callable that serves them.
        step: the newest call that any branch has made; -1 before the first.
        leader: the branch that reached `step` first; a change of leader means that a branch has
            stopped being called or has come back.
        doubt: why nothing stored may be used until a run has passed in full; None when all is well.
        arrived: number of branches that have appeared, those that are gone included.
        fresh: no call was ever made, so that the next one is call 0.
    """

    branches: dict[Hashable, Branch] = field(default_factory=dict)
    step: int = -1
    leader: Branch | None = None
    doubt: Doubt | None = None
    arrived: int = 0
    fresh: bool = True

    def welcome(self, name: Hashable, branch: Branch) -> None:
        """Add a branch, and let go of those that cannot come back or are too many."""
        for other in [key for key, known in self.branches.items() if known.expired]:
            del self.branches[other]
        if len(self.branches) >= _BRANCHES_PER_RUN:
            del self.branches[next(iter(self.branches))]
        self.branches[name] = branch
        self.arrived += 1

    def restart(self) -> None:
        """Begin a new run with nothing stored."""
        self.branches.clear()
        self.step = -1
        self.leader = None
        self.doubt = None
        self.arrived = 0
        self.fresh = True

    def distrust(self, doubt: Doubt, branch: Branch) -> None:
        """Use nothing stored from here on; the first reason is the one that is reported."""
        if self.doubt is None:
            self.doubt = doubt
            for other in self.branches.values():
                other.residuals.clear()
                other.whole = False
        branch.whole = False

    def advance(self, branch: Branch, call: int, calls: int) -> None:
        """Record that a branch has completed a call."""
        self.fresh = False
        branch.seen += 1
        branch.whole = call == 0 or branch.whole
        branch.next = call + 1
        if branch.next == calls and self.doubt is not None and not branch.whole:
            branch.next = 0  # the end of a run that was never understood proves nothing
        if call > self.step:
            if self.leader not in (None, branch):
                for other in self.branches.values():
                    other.recheck = other is not branch
            self.step, self.leader = call, branch

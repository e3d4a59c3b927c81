"""`Doubt`: why a call runs in full although the plan would have let it be forecast."""

from enum import StrEnum


class Doubt(StrEnum):
    """Reasons that `stats` counts. Doubt always means full compute."""

    NO_TIMESTEP = "no_timestep"
    """The plan knows no timesteps, and no session names the run."""
    MIXED_TIMESTEPS = "mixed_timesteps"
    """The batch holds several timesteps."""
    INFERENCE_TENSORS = "inference_tensors"
    """They do not show in-place changes, and no session names the run."""
    TIMESTEP_MISMATCH = "timestep_mismatch"
    """Another number of steps or another sampler than the plan's."""
    CALLS_DIFFER = "calls_differ"
    """`session(calls=...)` is not the plan's number of calls."""
    RESTARTED = "restarted"
    """A run began with the inputs of another one that was not over: interleaved or given up?"""
    POSITION_UNKNOWN = "position_unknown"
    """A branch appeared, lagged or came back, and no timestep tells where it is."""
    JOINED_LATE = "joined_late"
    """The branch was first seen, or seen again, in mid-run: residuals are missing."""
    INPUTS_CHANGED = "inputs_changed"
    """A prompt tensor was modified in place in mid-run."""
    WEIGHTS_CHANGED = "weights_changed"
    """A weight was modified in mid-run."""
    CARRY_MUTATED = "carry_mutated"
    """The block stack overwrote its own input, so there is no residual to store."""

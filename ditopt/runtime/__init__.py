"""The step runtime: sampling runs, schedules, forecasts, stored residuals, counters."""

from ditopt.runtime.counters import Artifact, Counters, Skips, count, invalidate, stats
from ditopt.runtime.cuda_graphs import CudaGraphs
from ditopt.runtime.doubts import Doubt
from ditopt.runtime.forecast import forecast
from ditopt.runtime.gate import Gate
from ditopt.runtime.inputs import InputRoles
from ditopt.runtime.memory import cache_bytes
from ditopt.runtime.programs import Programs
from ditopt.runtime.runner import StepRuntime
from ditopt.runtime.schedule import StepSchedule
from ditopt.runtime.session import SessionError, session
from ditopt.runtime.tracker import TrajectoryTracker

__all__ = [
    "Artifact",
    "Counters",
    "CudaGraphs",
    "Doubt",
    "Gate",
    "InputRoles",
    "Programs",
    "SessionError",
    "Skips",
    "StepRuntime",
    "StepSchedule",
    "TrajectoryTracker",
    "cache_bytes",
    "count",
    "forecast",
    "invalidate",
    "session",
    "stats",
]

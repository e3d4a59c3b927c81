"""The offline side of step caching: from recorded residuals to a schedule."""

from ditopt.caching.baselines import (
    at_budget,
    evenly_spaced,
    magcache,
    relative_change,
    smoothcache,
    taylorseer,
    teacache,
    uniform,
)
from ditopt.caching.cache_schedule import CacheSchedule, forced_calls, schedule_error
from ditopt.caching.fit import fit_row, fit_rows, forecast_error
from ditopt.caching.gram import ResidualGram
from ditopt.caching.rows import newton_row, reuse_row, taylor_row
from ditopt.caching.schedule_search import search_schedules

__all__ = [
    "CacheSchedule",
    "ResidualGram",
    "at_budget",
    "evenly_spaced",
    "fit_row",
    "fit_rows",
    "forced_calls",
    "forecast_error",
    "magcache",
    "newton_row",
    "relative_change",
    "reuse_row",
    "schedule_error",
    "search_schedules",
    "smoothcache",
    "taylor_row",
    "taylorseer",
    "teacache",
    "uniform",
]

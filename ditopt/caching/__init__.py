"""The offline side of step caching: from recorded residuals to a schedule."""

from ditopt.caching.baselines import (
    evenly_spaced,
    first_block_cache,
    magcache,
    relative_change,
    smoothcache,
    taylorseer,
    teacache,
    uniform,
)
from ditopt.caching.cache_schedule import CacheSchedule, forced_calls, schedule_error
from ditopt.caching.candidates import RULES, draw_calls, fitted, ranking_error
from ditopt.caching.choose import Chosen, choose_by_sampling, neighbours
from ditopt.caching.fit import fit_row, fit_rows, forecast_error
from ditopt.caching.gram import ResidualGram
from ditopt.caching.rows import foca_row, newton_row, reuse_row, taylor_row
from ditopt.caching.schedule_search import search_schedules
from ditopt.caching.signals import RunSignals, Signals, relative_l1

__all__ = [
    "RULES",
    "CacheSchedule",
    "Chosen",
    "ResidualGram",
    "RunSignals",
    "Signals",
    "choose_by_sampling",
    "draw_calls",
    "evenly_spaced",
    "first_block_cache",
    "fit_row",
    "fit_rows",
    "fitted",
    "foca_row",
    "forced_calls",
    "forecast_error",
    "magcache",
    "neighbours",
    "newton_row",
    "ranking_error",
    "relative_change",
    "relative_l1",
    "reuse_row",
    "schedule_error",
    "search_schedules",
    "smoothcache",
    "taylor_row",
    "taylorseer",
    "teacache",
    "uniform",
]

"""The search: from a profile and a goal to the best plan that full sampling confirms."""

from ditopt.search.closed_loop import LoopSpec
from ditopt.search.record import SearchRecord
from ditopt.search.run import Found, SearchOptions, find_plan, plan_from_profile, search
from ditopt.search.verify import Measured, Verify

__all__ = [
    "Found",
    "LoopSpec",
    "Measured",
    "SearchOptions",
    "SearchRecord",
    "Verify",
    "find_plan",
    "plan_from_profile",
    "search",
]

"""The search: from a profile and a goal to the best plan that full sampling confirms."""

from ditopt.search.closed_loop import LoopSpec
from ditopt.search.run import plan_from_profile, search
from ditopt.search.verify import Measured, Verify

__all__ = ["LoopSpec", "Measured", "Verify", "plan_from_profile", "search"]

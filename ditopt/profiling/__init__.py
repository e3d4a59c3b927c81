"""Offline measurement of a workload: candidate errors, residuals between steps, costs."""

from ditopt.profiling.run import ProfileSpec, profile
from ditopt.profiling.schema import Costs, Profile, SeedRecord, load_complete

__all__ = ["Costs", "Profile", "ProfileSpec", "SeedRecord", "load_complete", "profile"]

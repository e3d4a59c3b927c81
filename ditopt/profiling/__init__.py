"""Offline measurement of a workload: candidate errors, residuals between steps, costs."""

from ditopt.profiling.analysis import Analysis
from ditopt.profiling.merge import merge_profiles
from ditopt.profiling.run import ProfileSpec, profile
from ditopt.profiling.schema import Costs, Profile, SeedRecord, load_complete

__all__ = [
    "Analysis",
    "Costs",
    "Profile",
    "ProfileSpec",
    "SeedRecord",
    "load_complete",
    "merge_profiles",
    "profile",
]

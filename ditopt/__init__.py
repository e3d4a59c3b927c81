"""ditopt: a compiler-style optimizer for Diffusion Transformers.

    ditopt.profile(workload, "prof/")                          # measure every site, offline
    ditopt.search("prof/", min_psnr_db=30.0, out="plan.yaml")  # the fastest plan that meets a goal
    torch.compile(model, backend="ditopt", options={"plan": "plan.yaml"})  # apply it
    ditopt.export(workload, "engine/", "plan.yaml")            # or take it to another process:
    ditopt.Engine.load("engine/")                              # called as the model is

Public names load on first use: `import ditopt` imports neither torch nor any optional package.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditopt.bench import bench as bench
    from ditopt.export.engine import Engine as Engine
    from ditopt.export.run import export as export
    from ditopt.inspection import explain as explain
    from ditopt.plan import Plan as Plan
    from ditopt.profiling import profile as profile
    from ditopt.runtime import invalidate as invalidate
    from ditopt.runtime import session as session
    from ditopt.runtime import stats as stats
    from ditopt.search import search as search
    from ditopt.workload import Workload as Workload

__version__ = "0.1.0"

_HOME = {
    "Engine": "ditopt.export.engine",
    "Plan": "ditopt.plan",
    "Workload": "ditopt.workload",
    "bench": "ditopt.bench",
    "explain": "ditopt.inspection",
    "export": "ditopt.export.run",
    "invalidate": "ditopt.runtime",
    "profile": "ditopt.profiling",
    "search": "ditopt.search",
    "session": "ditopt.runtime",
    "stats": "ditopt.runtime",
}

__all__ = [*_HOME, "__version__"]


class _Package(ModuleType):
    """Importing `ditopt/search.py` or `ditopt/bench.py` must not replace the function so named."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ditopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

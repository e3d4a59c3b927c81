"""Rows in registers: Inductor's GPU kernels for norms and roundings, each row read once.

Inductor holds a row in registers up to 1,024 numbers; longer ones it reads once for the reduction
and again to use the result. Hidden sizes of DiTs are 1,152 to 4,096: on one H200 a norm and the
rounding behind it take 0.55 to 0.59 of the time when the row is held (`producers` in
benchmarks/results/quantization_h200.json).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

MOST_NUMBERS = 4096
"""Of a row; wider ones spill where a kernel holds several tensors of the row."""

_SALT = "post_grad_custom_post_pass"


@contextmanager
def rows_in_registers(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Inductor compiles inside of this with the wider limit, given the options that it yields.

    Options that already carry a pass of the user's own at the place where the compile cache looks
    for one come back as they are, and the limit stays Inductor's.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    if options.get(_SALT) is not None or type(V.choices) is not InductorChoices:
        yield dict(options)
        return

    class HeldRows(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            from torch._inductor import config

            if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            if not config.triton.persistent_reductions or cooperative_reduction:
                return False
            inner = features.get_reduction_hint() == ReductionHint.INNER
            return inner and bool(
                V.graph.sizevars.statically_known_leq(features.reduction_numel, MOST_NUMBERS)
            )

    class Salt(CustomGraphPass):
        """Changes nothing; its name tells the compile cache programs of this limit from others."""

        def __call__(self, graph: fx.Graph) -> None:
            pass

        def uuid(self) -> str:
            return f"ditopt: rows of {MOST_NUMBERS} numbers in registers"

    with V.set_choices_handler(HeldRows()):
        yield {**options, _SALT: Salt()}

"""PTX of lazy rescaling: multiply a thread's numbers by their factors, or jump over all of it.

For inline assembly with results first, each in the register of its number, then the factors.
"""

from __future__ import annotations

from collections.abc import Sequence


def rescale_text(numbers: int, tested: Sequence[int]) -> str:
    """Multiplies ``numbers`` numbers, $0 on, unless the ``tested`` factors are all 1.

    Args:
        numbers: of one thread and one block of assembly.
        tested: positions of factors that stand for all others. One that is no number is not 1.
    """
    factors = [f"${2 * numbers + i}" for i in range(numbers)]
    tests = [f"setp.neu.f32 p{n}, {factors[i]}, 0f3F800000;" for n, i in enumerate(tested)]
    step = 1
    while step < len(tested):
        starts = range(0, len(tested) - step, 2 * step)
        tests += [f"or.pred p{n}, p{n}, p{n + step};" for n in starts]
        step *= 2
    products = [f"mul.f32 ${i}, ${i}, {factor};" for i, factor in enumerate(factors)]
    lines = [f"{{ .reg .pred p<{len(tested)}>;", *tests, "@!p0 bra DONE;", *products, "DONE: }"]
    return " ".join(lines)


def rescale_operands(numbers: int) -> str:
    """The constraints of `rescale_text`."""
    return ",".join(["=f"] * numbers + [str(i) for i in range(numbers)] + ["f"] * numbers)

"""Amounts of memory as users write them."""

from __future__ import annotations

import re

from ditopt.errors import ConfigError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


def parse_bytes(text: str, least: int = 1) -> int:
    """The bytes in `512MiB`, `2GiB`, `2G` (the same) or `1.5GB` (powers of ten).

    Raises:
        ConfigError: anything else, or fewer than `least`.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"expected an amount of memory, got {text!r}", remedy="Write 512MiB.")
    number, unit, binary = match[1], match[2].upper(), match[3]
    decimal = unit and not binary and text.strip().upper().endswith("B")
    factor = 1000 ** "KMGT".index(unit) * 1000 if decimal else _UNITS[unit]
    found = int(float(number) * factor)
    if found < least:
        raise ConfigError(f"expected at least {least >> 20} MiB, got {text!r}")
    return found

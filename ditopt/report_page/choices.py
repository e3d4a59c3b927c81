"""What a head does, in words and as blocks: one entry for each distinct choice of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ditopt.patterns import Dense, HeadPattern, block_mask
from ditopt.report_page.blocks import encode, in_raster, merged

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ditopt.plan import Phase, Plan, SiteRecord
    from ditopt.profiling.schema import Profile

FAMILIES = {
    "dense": "dense",
    "skip": "skipped head",
    "band": "band",
    "multi_diagonal": "multi-diagonal",
    "stripe": "stripe",
    "window": "window",
    "circle": "circle",
    "frame_tile": "frame tile",
    "radial": "radial",
    "periodic": "periodic",
    "selector": "chosen from the data",
    "other": "another pattern",
    "spatial": "near in space",
    "temporal": "the same place through time",
    "sink": "the first units",
    "cluster": "by content",
    "diffuse": "everything",
    "static": "static",
    "refresh": "refresh online",
    "none": "not measured",
}
"""Names of colours and signs: kinds of patterns, selectors, classes of heads, verdicts."""


@dataclass(frozen=True)
class Choice:
    """One way to compute a head.

    Attributes:
        name: the kind, in words.
        family: colour and sign, a key of `FAMILIES`.
        parameters: the kind's sizes and 8-bit products, in words; empty where it has none.
        density: kept fraction of blocks; None where the data decides how many.
        order: token order in which the blocks lie; empty for the model's own.
        remainder: what stands for dropped blocks; empty where nothing does.
        rows: of `mask`.
        columns: of `mask`.
        mask: base64 of uint8 [rows, columns], 255 where all pairs of tokens are kept, in the
            model's own token order; None where the data decides.
    """

    name: str
    family: str
    parameters: str
    density: float | None
    order: str
    remainder: str
    rows: int
    columns: int
    mask: str | None


class Choices:
    """The distinct choices of a plan, numbered as they are met; masks are `side` blocks wide."""

    def __init__(self, profile: Profile, plan: Plan | None, side: int) -> None:
        self._profile, self._plan, self._side = profile, plan, side
        self._numbers: dict[tuple[Any, ...], int] = {}
        self.found: list[Choice] = []

    def heads(self, site: SiteRecord, phase: Phase | None) -> list[int]:
        """The number of each head's choice at one site."""
        remainder = None if phase is None else phase.remainders.get(site.id)
        told = "" if remainder is None else _REMAINDERS.get(remainder.kind, remainder.kind)
        selector = None if phase is None else phase.selectors.get(site.id)
        if selector is not None:
            return [self._number(site, selector, told, from_data=True)] * site.heads
        patterns = None if phase is None else phase.attention.get(site.id)
        chosen: tuple[HeadPattern, ...] = patterns or (Dense(),) * site.heads
        rule = None if phase is None else phase.arithmetic.get(site.id)
        products = "" if rule is None else f"products {rule.kind}"
        return [self._number(site, pattern, told, products) for pattern in chosen]

    def _number(
        self,
        site: SiteRecord,
        rule: BaseModel,
        remainder: str,
        products: str = "",
        *,
        from_data: bool = False,
    ) -> int:
        shape = self._profile.shapes.get(site.id)
        tokens = None if shape is None else shape.tokens
        key = (rule, remainder, tokens, products)
        if key not in self._numbers:
            self._numbers[key] = len(self.found)
            found = self._describe(rule, remainder, tokens, from_data)
            words = ", ".join(part for part in (found.parameters, products) if part)
            self.found.append(replace(found, parameters=words))
        return self._numbers[key]

    def _describe(self, rule: Any, remainder: str, tokens: int | None, from_data: bool) -> Choice:
        kind = rule.kind
        family = "selector" if from_data else kind if kind in FAMILIES else "other"
        order = None if self._plan is None else self._plan.order
        exact = kind in ("dense", "skip")
        # A selector may state how much it keeps; which blocks those are is up to the data.
        density: float | None = {"dense": 1.0, "skip": 0.0}.get(
            kind, getattr(rule, "density", None)
        )
        rows = columns = 0
        mask = None
        if tokens is not None and not from_data:
            block = self._profile.block if self._plan is None else self._plan.block
            layout = self._profile.layout if self._plan is None else self._plan.layout
            sizes = (tokens, tokens, block.q, block.k)
            blocks = block_mask(rule, layout, *sizes, None if exact else order).double().numpy()
            density = float(blocks.mean())
            if order is not None and layout is not None and not exact:
                blocks = in_raster(blocks, layout.fit(tokens), order, block.q, block.k)
            shares = merged(blocks, self._side)[0]
            rows, columns = shares.shape
            mask = encode(shares)
        return Choice(
            name=FAMILIES.get(kind, kind.replace("_", " ")),
            family=family,
            parameters=in_words(rule),
            density=density,
            order="" if order is None or exact else order.kind.replace("_", " "),
            remainder=remainder if kind != "dense" else "",
            rows=rows,
            columns=columns,
            mask=mask,
        )


_REMAINDERS = {"mean": "the mean of each block", "linear": "linear attention"}


def in_words(rule: BaseModel) -> str:
    """The numbers of a pattern or selector: `frames 3, rows 7`."""
    parts = []
    for name, value in rule.model_dump().items():
        if name == "kind":
            continue
        words = name.replace("_", " ")
        if isinstance(value, dict):
            inner = in_words(getattr(rule, name))
            parts.append(f"{words} {value.get('kind', '')} {inner}".rstrip())
        elif isinstance(value, bool):
            parts.append(words if value else f"no {words}")
        elif isinstance(value, float):
            parts.append(f"{words} {value:g}")
        else:
            parts.append(f"{words} {value}")
    return ", ".join(parts)

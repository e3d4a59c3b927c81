"""Checks across the parts of a plan; each error names the field, the expected and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from ditopt.errors import PlanError, did_you_mean

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout
    from ditopt.plan.records import LinearRecord, ModelRecord, Sampler, SiteRecord
    from ditopt.plan.schema import Cache, Phase
    from ditopt.token_order import TokenOrder


class SiteLike(Protocol):
    """What a captured attention site must tell about itself; see `SiteRecord`."""

    @property
    def id(self) -> str:
        """Stable id."""

    @property
    def kind(self) -> str:
        """Self, cross or joint."""

    @property
    def heads(self) -> int:
        """Query heads."""

    @property
    def head_dim(self) -> int:
        """Size of one head."""


def describe(error: Exception) -> str:
    """The first problem that pydantic found: field, cause and what stood there, on one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    field = ""
    for part in first["loc"]:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else str(part)
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown key; remove it or correct its spelling"
    if first["type"] == "missing":
        return f"{field}: missing; every plan states it"
    value = repr(first["input"])
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{field or 'plan'}: {message}, got {shown}"


def check_sampler(sampler: Sampler) -> None:
    """One timestep per call, and the timestep among the varying inputs."""
    if sampler.timesteps and len(sampler.timesteps) != sampler.calls:
        raise PlanError(
            f"sampler.timesteps: expected {sampler.calls} values, one per call, "
            f"got {len(sampler.timesteps)}"
        )
    if sampler.timestep is not None and sampler.timestep not in sampler.varying:
        raise PlanError(
            f"sampler.timestep: {sampler.timestep!r} is not among sampler.varying",
            remedy=did_you_mean(sampler.timestep, sampler.varying),
        )


def check_phases(phases: Sequence[Phase], calls: int) -> None:
    """Half-open ranges that cover calls 0 .. `calls` without gap or overlap."""
    expected = 0
    for number, phase in enumerate(phases):
        start, stop = phase.calls
        if start != expected or stop <= start:
            raise PlanError(
                f"phases[{number}].calls: expected a range that is not empty and starts at "
                f"{expected}, where the one before ends, got [{start}, {stop}]"
            )
        expected = stop
    if expected != calls:
        raise PlanError(f"phases: cover calls 0 to {expected}, the sampler makes {calls}")


def check_rules(
    phases: Sequence[Phase], sites: Sequence[SiteRecord], layout: TokenLayout | None
) -> None:
    """Rules name recorded sites, have one pattern per head, and patterns that the site can take."""
    by_id = {site.id: site for site in sites}
    if len(by_id) != len(sites):
        raise PlanError("model.sites: an id stands twice; site ids are unique")
    for number, phase in enumerate(phases):
        for site_id, patterns in phase.attention.items():
            field = f"phases[{number}].attention[{site_id!r}]"
            site = by_id.get(site_id)
            if site is None:
                raise PlanError(f"{field}: no such site", remedy=did_you_mean(site_id, by_id))
            if len(patterns) != site.heads:
                raise PlanError(
                    f"{field}: expected {site.heads} patterns, one per head, got {len(patterns)}"
                )
            geometric = [p.kind for p in patterns if p.kind not in ("dense", "skip")]
            if geometric and layout is None:
                raise PlanError(f"{field}: pattern {geometric[0]!r} needs `layout`, which is null")
            if geometric and site.kind == "cross":
                raise PlanError(
                    f"{field}: cross-attention takes dense and skip only, got {geometric[0]!r}"
                )
        for site_id in phase.selectors:
            _check_selector(f"phases[{number}].selectors[{site_id!r}]", site_id, phase, by_id)
            if layout is None:
                raise PlanError(
                    f"phases[{number}].selectors[{site_id!r}]: needs `layout`, which is null"
                )


def check_linear_rules(phases: Sequence[Phase], linears: Sequence[LinearRecord]) -> None:
    """Rules about linear layers name recorded ones."""
    known = {linear.id for linear in linears}
    if len(known) != len(linears):
        raise PlanError("model.linears: an id stands twice; ids are unique")
    for number, phase in enumerate(phases):
        for site_id in phase.linear:
            if site_id not in known:
                field = f"phases[{number}].linear[{site_id!r}]"
                raise PlanError(f"{field}: no such site", remedy=did_you_mean(site_id, known))


def check_remainders(phases: Sequence[Phase]) -> None:
    """Remainders stand at sites that leave something out."""
    for number, phase in enumerate(phases):
        for site_id in phase.remainders:
            field = f"phases[{number}].remainders[{site_id!r}]"
            if site_id not in phase.attention and site_id not in phase.selectors:
                raise PlanError(
                    f"{field}: the site leaves nothing out; it stands in neither `attention` nor "
                    "`selectors`"
                )
            if getattr(phase.selectors.get(site_id), "kind", None) == "hierarchical":
                raise PlanError(f"{field}: a hierarchical selector has its own")


def check_arithmetic(phases: Sequence[Phase], sites: Sequence[SiteRecord]) -> None:
    """8-bit products are of self-attention whose lists, if it has any, are a plan's patterns."""
    by_id = {site.id: site for site in sites}
    for number, phase in enumerate(phases):
        for site_id in phase.arithmetic:
            field = f"phases[{number}].arithmetic[{site_id!r}]"
            site = by_id.get(site_id)
            if site is None:
                raise PlanError(f"{field}: no such site", remedy=did_you_mean(site_id, by_id))
            if site.kind == "cross":
                raise PlanError(f"{field}: cross-attention keeps its own arithmetic")
            for other in ("selectors", "remainders"):
                if site_id in getattr(phase, other):
                    raise PlanError(
                        f"{field}: the site stands in `{other}` too, which 8-bit products do not "
                        "go with; keep one of the two"
                    )


def _check_selector(
    field: str, site_id: str, phase: Phase, by_id: Mapping[str, SiteRecord]
) -> None:
    site = by_id.get(site_id)
    if site is None:
        raise PlanError(f"{field}: no such site", remedy=did_you_mean(site_id, by_id))
    if site_id in phase.attention:
        raise PlanError(f"{field}: the site stands in `attention` too; keep one of the two")
    if site.kind == "cross":
        raise PlanError(f"{field}: cross-attention takes no selector")


def check_orders(phases: Sequence[Phase], order: TokenOrder | None) -> None:
    """Selectors that choose an order of tokens start from the raster."""
    for number, phase in enumerate(phases):
        for site_id, selector in phase.selectors.items():
            if selector.kind in ("clusters", "two_masks") and order is not None:
                raise PlanError(
                    f"phases[{number}].selectors[{site_id!r}]: {selector.kind!r} chooses an order "
                    f"of tokens for each head; `order` must be null, got {order.kind!r}"
                )


def check_cache(cache: Cache, calls: int) -> None:
    """Every call is full or has coefficients, and none lies beyond the last call."""
    known = {*cache.full, *cache.coefficients}
    beyond = sorted(call for call in known if call >= calls)
    if beyond:
        raise PlanError(f"cache: call {beyond[0]} does not exist, the sampler makes {calls} calls")
    for call in range(calls):
        if call not in known:
            raise PlanError(
                f"cache.coefficients: call {call} is neither in cache.full nor has coefficients"
            )


def check_model(record: ModelRecord, sites: Sequence[SiteLike], architecture: str) -> None:
    """The recorded model is the captured one; otherwise say what differs, sites first."""
    differences = list(_site_differences(record.sites, sites))
    if architecture != record.architecture and not differences:
        differences = ["parameter names, shapes or dtypes differ, attention sites are the same"]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise PlanError(
            f"model: the plan is for {record.name}, another model than this one: "
            f"{'; '.join(differences[:3])}{more}",
            remedy="Profile this model and plan for it.",
        )


def _site_differences(recorded: Sequence[SiteRecord], sites: Sequence[SiteLike]) -> list[str]:
    captured = {site.id: site for site in sites}
    found = []
    for site in recorded:
        other = captured.pop(site.id, None)
        if other is None:
            found.append(f"site {site.id!r} is in the plan only")
            continue
        for name in ("kind", "heads", "head_dim"):
            ours, theirs = getattr(site, name), getattr(other, name)
            if ours != theirs:
                found.append(f"site {site.id!r} has {name} {theirs}, the plan says {ours}")
    found += [f"site {site_id!r} is in the model only" for site_id in captured]
    return found

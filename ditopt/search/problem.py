"""The attention part of the search: what each choice at each head costs and how much it errs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from ditopt.errors import ProfileError

if TYPE_CHECKING:
    from ditopt.profiling.schema import AttentionCost, AttentionOption, Profile, SeedRecord

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SiteOptions:
    """One attention site.

    A site is dense as a whole, or one call of the block-sparse executor computes all its heads,
    each with one of C options; option 0 is the dense pattern.

    Attributes:
        id: the site's id.
        dense_ms: time of the dense kernel.
        fixed_ms: time of the executor that does not depend on the options.
        option_ms: [C] further time of one head, by option.
        error: [H, C] error of one head, by option; these add up over heads and sites.
    """

    id: str
    dense_ms: float
    fixed_ms: float
    option_ms: Floats
    error: Floats


def plain_options(profile: Profile) -> tuple[AttentionOption, ...]:
    """The options that are searched: in the model's own token order, dropped blocks left out."""
    return tuple(profile.options[index] for index in _plain(profile))


def _plain(profile: Profile) -> list[int]:
    return [
        index
        for index, option in enumerate(profile.options)
        if option.order == 0 and option.remainder == "drop"
    ]


def site_options(
    profile: Profile, records: Sequence[SeedRecord], first_call: int
) -> list[SiteOptions]:
    """The profiled sites with errors over the calls from `first_call` on.

    The error of a head is its squared error relative to the squared norm of its *site*, weighted by
    the step that each call leads to (`SeedRecord.step_energy`), mean over seeds, and divided by the
    number of sites. A pattern errs in much the same way at every call, so amplitudes add up, not
    energies: ``(sum_t g_t r_t)^2 <= (sum_t g_t) (sum_t g_t r_t^2)`` for steps g_t and relative
    errors r_t, with equality for a constant error. Calls between observed ones count as the nearest
    observed one.
    """
    costs = {cost.shape: cost for cost in profile.costs.attention} if profile.costs else {}
    weights = [_observed_weights(profile, record, first_call) for record in records]
    found, plain = [], _plain(profile)
    for site, shape in profile.shapes.items():
        per_seed = [
            np.tensordot(weight, relative_error(record, site), axes=1)
            for record, weight in zip(records, weights, strict=True)
        ]
        if shape not in costs:
            raise ProfileError(
                f"profile.json: costs.attention: no cost for the shape of site {site!r}",
                remedy="Profile into a new folder.",
            )
        kept = np.array(profile.kept(shape))[plain]
        fixed_ms, full_ms = sparse_cost(costs[shape])
        found.append(
            SiteOptions(
                id=site,
                dense_ms=costs[shape].dense_ms,
                fixed_ms=fixed_ms,
                option_ms=kept * full_ms / shape.heads,
                error=np.mean(per_seed, axis=0)[:, plain] / len(profile.shapes),
            )
        )
    return found


def relative_error(record: SeedRecord, site: str) -> Floats:
    """[O, H, C] of a site: squared error of a head over the squared norm of all heads."""
    norm = record.squared_norm[site].sum(dim=1)[:, None, None].clamp(min=1e-30)
    return np.asarray((record.squared_error[site] / norm).numpy(), dtype=np.float64)


def sparse_cost(cost: AttentionCost) -> tuple[float, float]:
    """Least-squares line through the measured table: (fixed, added at density 1), both >= 0 ms."""
    kept, times = np.array(cost.sparse_ms, dtype=np.float64).T
    (fixed, added), _ = nnls(np.stack([np.ones_like(kept), kept], axis=1), times)
    return float(fixed), float(added)


def _observed_weights(profile: Profile, record: SeedRecord, first_call: int) -> Floats:
    """[O] weights ``g_t sum(g)`` of the calls that each observed call stands for."""
    observed = np.array(profile.observed_calls)
    weights = np.zeros(len(observed))
    usable = np.flatnonzero(observed >= first_call)
    if not len(usable):
        usable = np.array([len(observed) - 1])
    steps = record.step_energy.sqrt().numpy()
    for call in range(first_call, profile.sampler.calls):
        nearest = usable[np.argmin(np.abs(observed[usable] - call))]
        weights[nearest] += steps[call] * steps[first_call:].sum()
    return weights

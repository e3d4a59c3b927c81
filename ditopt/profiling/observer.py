"""The observer that a profile run hangs into the canonical graph, and the sums it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ditopt.caching import ResidualGram
from ditopt.errors import ProfileError
from ditopt.plan import Block, SiteRecord
from ditopt.plan.checks import SiteLike
from ditopt.profiling.arithmetics import ARITHMETICS, arithmetic_errors
from ditopt.profiling.candidates import SCRATCH_BYTES, candidate_errors
from ditopt.profiling.cluster_maps import cluster_recall
from ditopt.profiling.map_record import MapRecord
from ditopt.profiling.maps import HeadMaps
from ditopt.profiling.options import OptionSet, selected_blocks
from ditopt.profiling.schema import AttentionOption, SeedRecord, SelectorOption, SiteShape

if TYPE_CHECKING:
    from ditopt.kernels.block_sparse_attention.reference_8bit import Arithmetic
    from ditopt.layout import TokenLayout


class ObservedSite(SiteLike, Protocol):
    """What the observer asks of a site: a record's facts, and its mask."""

    @property
    def mask(self) -> str:
        """None, key padding or bias."""


class ProfileObserver:
    """Collects errors and maps on some calls, and the block stack's residuals on all.

    `ditopt.observe` calls `suggest_layout` before the first attention, if it infers a grid. The
    profile calls `begin_seed` before each sampling loop and `begin_call` before each call.

    Args:
        layout: token grid, None where unknown.
        block: block sizes.
        calls: T, calls per guidance branch.
        observed_calls: the call indices at which errors are measured and maps are taken.
        branches: guidance branches that call the model separately.
        memory_bytes: memory for tiles of attention and for residuals, which are sketched where
            they need more.
    """

    def __init__(
        self,
        layout: TokenLayout | None,
        block: Block,
        calls: int,
        observed_calls: Sequence[int],
        branches: int,
        memory_bytes: int,
    ) -> None:
        self.layout = layout
        self.block = block
        self.observed_calls = tuple(observed_calls)
        self.sites: dict[str, SiteRecord] = {}
        self.shapes: dict[str, SiteShape] = {}
        self.choices = OptionSet((None,), ((),))
        self.left_dense: dict[str, str] = {}
        self.residual_bytes = 0
        self._calls = calls
        self._branches = branches
        self._scratch_bytes = min(SCRATCH_BYTES, memory_bytes // 4)
        self._memory_bytes = memory_bytes - self._scratch_bytes
        self._keep: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.begin_seed()

    def suggest_layout(self, layout: TokenLayout) -> None:
        """Adopt a token grid that was inferred from the graph, where the workload states none."""
        if self.layout is None:
            self.layout = layout

    def begin_seed(self) -> None:
        """Forget the sums of the sampling loop before; sites and options stay."""
        self._call = self._branch = 0
        self._maps: dict[str, dict[int, HeadMaps]] = {}
        self._kept: dict[str, Tensor] = {}
        self._clusters: dict[str, Tensor] = {}
        self._errors: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._selected: dict[str, Tensor] = {}
        self._rounded: dict[str, Tensor] = {}
        self._grams: dict[int, ResidualGram] = {}
        self._hidden_energy = torch.zeros(self._calls, dtype=torch.float64)

    def begin_call(self, call: int, branch: int) -> None:
        """Attribute what follows to a call index of a guidance branch."""
        self._call, self._branch = call, branch

    def attention(
        self,
        site: ObservedSite,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        mask: Tensor | None,
    ) -> None:
        """Note a site; measure its options on observed calls. q, k, v are [B, H, N, D]."""
        self._require_finite(site.id, q, k, v)
        if site.id not in self.sites:
            self._meet(site, q, k)
        if site.id in self.shapes and self._call in self.observed_calls:
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            self._measure(site.id, q, k, v, scale)
            if self._branch == 0 and self._call == self.middle_call:
                self._clusters[site.id] = cluster_recall(q, k, scale)

    def _measure(self, site: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """Errors of every option, one pass for each order of tokens; maps in the model's own."""
        row, choices = self.observed_calls.index(self._call), len(self.options)
        zeros = torch.zeros(len(self.observed_calls), q.shape[1], choices, dtype=torch.float64)
        errors = self._errors.setdefault(site, zeros)
        norms = self._norms.setdefault(site, zeros[..., 0].clone())
        kept = self._kept.setdefault(site, torch.ones_like(zeros, dtype=torch.float32))
        none = zeros.new_zeros(*zeros.shape[:2], len(self.selectors))
        selected = self._selected.setdefault(site, none)
        rounded = self._rounded.setdefault(
            site, zeros.new_zeros(*zeros.shape[:2], len(ARITHMETICS))
        )
        rounded[row] += arithmetic_errors(
            q, k, v, block_k=self.block.k, scale=scale, scratch_bytes=self._scratch_bytes
        )
        chosen = selected_blocks(q, k, self.layout, self.block, scale)
        for order in range(len(self.choices.orders)):
            places, masks = self._masks_of(order, q.shape[2])
            moved = [x if places is None else x[:, :, places.to(x.device)] for x in (q, k, v)]
            found = candidate_errors(
                *(moved[0], moved[1], moved[2], masks),
                block_q=self.block.q,
                block_k=self.block.k,
                scale=scale,
                chosen=chosen if order == 0 else None,
                scratch_bytes=self._scratch_bytes,
            )
            static = len(masks)
            dropped, means = self.choices.places(order)
            errors[row, :, dropped] += found.squared_error[:, :static]
            errors[row, :, means] += found.mean_error[:, :static]
            if self._branch == 0:
                masses = found.kept_mass[:, :static].float()
                kept[row, :, dropped] = kept[row, :, means] = masses
            if order == 0:
                norms[row] += found.squared_norm
                by_data = (found.squared_error[:, static:], found.mean_error[:, static:])
                selected[row] += torch.cat(by_data, 1)
                if self._branch == 0:
                    self._maps.setdefault(site, {})[row] = HeadMaps.of(found.mass)

    def stack(self, base: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        """Add the residuals of the block stack at this call to the branch's Gram matrix."""
        self._require_finite("the block stack's output", *outputs)
        residuals = [
            after if before is None else after - before
            for before, after in zip(base, outputs, strict=True)
        ]
        if self._branch not in self._grams:
            size = sum(residual.numel() for residual in residuals)
            self.residual_bytes = self._branches * sum(residual.nbytes for residual in residuals)
            self._grams[self._branch] = ResidualGram(self._calls, sketch=self._sketch(size))
        self._grams[self._branch].add(self._call, *residuals)
        for after in outputs:
            self._hidden_energy[self._call] += after.double().square().sum().cpu()

    def finish_seed(self, step_energy: Tensor) -> SeedRecord:
        """The sums of the loop; `step_energy` [T] as in `SeedRecord`."""
        gram = torch.zeros(self._calls, self._calls, dtype=torch.float64)
        for branch in self._grams.values():
            gram += branch.matrix()
        return SeedRecord(
            squared_error=self._errors,
            squared_norm=self._norms,
            selector_error=self._selected,
            arithmetic_error=self._rounded,
            gram=gram,
            hidden_energy=self._hidden_energy,
            step_energy=step_energy,
        )

    def maps(self) -> MapRecord:
        """What the loop's first branch showed of the attention maps."""
        names = ("mass", "recall", "top", "rank")
        stacked = {
            name: {
                site: torch.stack([getattr(seen[row], name) for row in sorted(seen)])
                for site, seen in self._maps.items()
            }
            for name in names
        }
        return MapRecord(**stacked, kept=self._kept, clusters=self._clusters)

    @property
    def options(self) -> tuple[AttentionOption, ...]:
        """All that is measured at each site; none before the first site was met."""
        return self.choices.options if any(self.choices.patterns) else ()

    @property
    def selectors(self) -> tuple[SelectorOption, ...]:
        """Choices by the data that are measured at each site."""
        return self.choices.selectors

    @property
    def arithmetics(self) -> tuple[Arithmetic, ...]:
        """8-bit products that are measured at each site; none before the first site was met."""
        return ARITHMETICS if self.shapes else ()

    @property
    def middle_call(self) -> int | None:
        """The observed call at which clusters are looked for: their pass is not for every call."""
        calls = self.observed_calls
        return calls[len(calls) // 2] if calls else None

    def _sketch(self, elements: int) -> int | None:
        """Size of the residuals' sketch, None where exact ones fit into the memory."""
        if 4 * elements * self._calls * self._branches <= self._memory_bytes:
            return None
        return max(1, self._memory_bytes // (8 * self._calls * self._branches))

    def _meet(self, site: ObservedSite, q: Tensor, k: Tensor) -> None:
        kind = site.kind
        if kind not in ("self", "cross", "joint"):
            raise ValueError(f"site {site.id!r} has unknown kind {kind!r}")
        self.sites[site.id] = SiteRecord.model_validate(
            {"id": site.id, "kind": kind, "heads": site.heads, "head_dim": site.head_dim}
        )
        reason = self._reason_to_leave_dense(site, q, k)
        if reason is not None:
            self.left_dense[site.id] = reason
            return
        batch, heads, tokens, head_dim = q.shape
        self.shapes[site.id] = SiteShape(
            batch=batch,
            heads=heads,
            tokens=tokens,
            head_dim=head_dim,
            dtype=str(q.dtype).removeprefix("torch."),
        )
        if not self.options:
            self.choices = OptionSet.of(self.layout, tokens, self.block)

    def _reason_to_leave_dense(self, site: ObservedSite, q: Tensor, k: Tensor) -> str | None:
        if site.kind == "cross" or q.shape[2] != k.shape[2]:
            return "queries and keys are different sequences"
        if k.shape[1] != q.shape[1]:
            return f"{q.shape[1]} query heads share {k.shape[1]} key heads"
        if site.mask != "none":
            return f"it has a mask ({site.mask})"
        if self.layout is None:
            return None
        try:
            self.layout.fit(q.shape[2])
        except ValueError as error:
            return str(error)
        return None

    def _masks_of(self, order: int, tokens: int) -> tuple[Tensor | None, Tensor]:
        """Where an order takes tokens from, and the blocks that its patterns keep."""
        if (order, tokens) not in self._keep:
            self._keep[order, tokens] = (
                self.choices.permutation(order, self.layout, tokens),
                self.choices.masks(order, self.layout, tokens, self.block),
            )
        return self._keep[order, tokens]

    def _require_finite(self, where: str, *tensors: Tensor) -> None:
        for tensor in tensors:
            if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
                raise ProfileError(
                    f"NaN or infinity at call {self._call} in {where}",
                    remedy="Check the weights and the dtype; a profile needs finite values.",
                )

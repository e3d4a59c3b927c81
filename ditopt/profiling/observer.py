"""The observer that a profile run hangs into the canonical graph, and the sums it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ditopt.caching import ResidualGram
from ditopt.errors import ProfileError
from ditopt.patterns import block_mask, candidates
from ditopt.plan import Block, SiteRecord
from ditopt.plan.checks import SiteLike
from ditopt.profiling.candidates import candidate_errors
from ditopt.profiling.schema import AttentionOption, SeedRecord, SiteShape

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout


class ObservedSite(SiteLike, Protocol):
    """What the observer asks of a site: a record's facts, and its mask."""

    @property
    def mask(self) -> str:
        """None, key padding or bias."""


class ProfileObserver:
    """Collects candidate errors on some calls, and the block stack's residuals on all.

    `ditopt.observe` calls `suggest_layout` before the first attention, if it infers a grid. The
    profile calls `begin_seed` before each sampling loop and `begin_call` before each call.

    Args:
        layout: token grid, None where unknown.
        block: block sizes.
        calls: T, calls per guidance branch.
        observed_calls: the call indices at which candidate errors are measured.
        branches: guidance branches that call the model separately.
        memory_bytes: memory for residuals; they are sketched where they need more.
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
        self.options: tuple[AttentionOption, ...] = ()
        self.left_dense: dict[str, str] = {}
        self._calls = calls
        self._branches = branches
        self._memory_bytes = memory_bytes
        self._keep: dict[int, Tensor] = {}
        self.begin_seed()

    def suggest_layout(self, layout: TokenLayout) -> None:
        """Adopt a token grid that was inferred from the graph, where the workload states none."""
        if self.layout is None:
            self.layout = layout

    def begin_seed(self) -> None:
        """Forget the sums of the sampling loop before; sites and candidates stay."""
        self._call = self._branch = 0
        self._errors: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
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
        """Note a site; measure its candidates on observed calls. q, k, v are [B, H, N, D]."""
        self._require_finite(site.id, q, k, v)
        if site.id not in self.sites:
            self._meet(site, q, k)
        if site.id not in self.shapes or self._call not in self.observed_calls:
            return
        keep = self._keep_masks(q.shape[2])
        found = candidate_errors(
            *(q, k, v, keep),
            block_q=self.block.q,
            block_k=self.block.k,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
        )
        row = self.observed_calls.index(self._call)
        heads, choices = found.squared_error.shape
        zeros = torch.zeros(len(self.observed_calls), heads, choices, dtype=torch.float64)
        self._errors.setdefault(site.id, zeros)[row] += found.squared_error
        self._norms.setdefault(site.id, zeros[..., 0].clone())[row] += found.squared_norm

    def stack(self, base: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        """Add the residuals of the block stack at this call to the branch's Gram matrix."""
        self._require_finite("the block stack's output", *outputs)
        residuals = [
            after if before is None else after - before
            for before, after in zip(base, outputs, strict=True)
        ]
        if self._branch not in self._grams:
            size = sum(residual.numel() for residual in residuals)
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
            gram=gram,
            hidden_energy=self._hidden_energy,
            step_energy=step_energy,
        )

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
            patterns = candidates(self.layout, tokens, self.block.q, self.block.k)
            self.options = tuple(AttentionOption(pattern=pattern) for pattern in patterns)

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

    def _keep_masks(self, tokens: int) -> Tensor:
        """Blocks that each candidate keeps, bool [C, QB, KB]."""
        if tokens not in self._keep:
            sizes = (tokens, tokens, self.block.q, self.block.k)
            self._keep[tokens] = torch.stack(
                [block_mask(option.pattern, self.layout, *sizes) for option in self.options]
            )
        return self._keep[tokens]

    def _require_finite(self, where: str, *tensors: Tensor) -> None:
        for tensor in tensors:
            if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
                raise ProfileError(
                    f"NaN or infinity at call {self._call} in {where}",
                    remedy="Check the weights and the dtype; a profile needs finite values.",
                )

"""Measuring a plan by full sampling against the dense result of the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from safetensors import SafetensorError

from ditopt import files, fingerprint
from ditopt.errors import ProfileError
from ditopt.metrics import compare, psnr
from ditopt.plan import Plan
from ditopt.profiling.cost import every_second_call, timed_loops
from ditopt.profiling.loops import only_model
from ditopt.search.exchange import ExchangeableModel

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.caching import CacheSchedule
    from ditopt.profiling.schema import Profile
    from ditopt.workload import Workload

EXACT_DB = 200.0
"""Stands for the infinite PSNR of equal results; float32 rounding alone gives less."""


@dataclass(frozen=True)
class Measured:
    """One seed under one plan.

    Attributes:
        psnr_db: against the dense result, to 0.01 dB, at most `EXACT_DB`.
        seconds: time of the loop's calls without compilation, see `LoopTimes`.
        ssim: against the dense result, to 1e-5; NaN where it is not known.
        result: what the loop returned, on the CPU; None where it is not at hand.
    """

    psnr_db: float
    seconds: float
    ssim: float = math.nan
    result: Tensor | None = field(default=None, compare=False, repr=False)

    def without_result(self) -> Measured:
        """The numbers alone."""
        return replace(self, result=None)


Verify = Callable[[Plan, Sequence[int]], list[Measured]]
"""Samples each seed with the plan applied."""


class SamplingVerifier:
    """Compiles the workload's model with the plan and samples; dense results are kept on disk.

    Raises:
        ProfileError: the workload's model is not the one that was profiled.
    """

    def __init__(self, workload: Workload, profile: Profile, folder: Path) -> None:
        model = only_model(workload)
        for name, recorded, now in (
            ("architecture", profile.model.architecture, fingerprint.architecture(model)),
            ("weights", profile.model.weights, fingerprint.weights(model)),
        ):
            if recorded != now:
                raise ProfileError(
                    f"the profile is of another model than the workload's: model.{name} differs",
                    remedy="Profile this workload into a new folder.",
                )
        self._workload, self._profile, self._folder = workload, profile, folder
        self._exchangeable: ExchangeableModel | None = None

    def __call__(self, plan: Plan, seeds: Sequence[int]) -> list[Measured]:
        """Sample each seed with the plan applied."""
        references = [self._dense(seed) for seed in seeds]
        loops = timed_loops(self._workload, plan, list(seeds))
        return [
            self._measured(loop.result.cpu(), dense, loop.seconds)
            for loop, dense in zip(loops, references, strict=True)
        ]

    def _measured(self, result: Tensor, dense: Tensor, seconds: float) -> Measured:
        quality = compare(result, dense, self._profile.data_range)
        return Measured(
            psnr_db=min(EXACT_DB, round(quality.psnr_db, 2)),
            seconds=seconds,
            ssim=round(quality.ssim, 5),
            result=result,
        )

    def schedule_psnr_db(self, schedule: CacheSchedule, seed: int) -> float:
        """One sample with this cache schedule and dense attention; all share one compilation."""
        if self._exchangeable is None:
            # Dynamo keeps a few compiled variants of one function and then runs it eagerly.
            torch.compiler.reset()
            model = only_model(self._workload)
            self._exchangeable = ExchangeableModel(model, every_second_call(self._profile))
        self._exchangeable.use(schedule)
        denoisers = dict.fromkeys(self._workload.models, self._exchangeable.model)
        with torch.no_grad():
            result = self._workload.run(seed, denoisers)
        return min(EXACT_DB, psnr(result.cpu(), self._dense(seed), self._profile.data_range))

    def _dense(self, seed: int) -> Tensor:
        """The result of the model as it is, in eager PyTorch."""
        path = self._folder / f"dense_{seed}.safetensors"
        if path.exists():
            try:
                return safetensors.torch.load(path.read_bytes())["result"]
            except (SafetensorError, KeyError) as error:
                raise ProfileError(
                    f"{path.name} is damaged: {error}", remedy=f"Delete {path.name} and plan again."
                ) from error
        result = self._workload.run(seed).cpu().contiguous()
        with files.atomic_path(path) as temporary:
            temporary.write_bytes(safetensors.torch.save({"result": result}))
        return result


def save_results(folder: Path, results: Mapping[int, Tensor]) -> None:
    """Write `optimized_<seed>.safetensors` of the adopted plan; those of an earlier one go."""
    for stale in folder.glob("optimized_*.safetensors"):
        stale.unlink()
    for seed, result in results.items():
        with files.atomic_path(folder / f"optimized_{seed}.safetensors") as temporary:
            temporary.write_bytes(safetensors.torch.save({"result": result.contiguous()}))

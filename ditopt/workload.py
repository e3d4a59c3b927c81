"""`Workload`: a model together with the loop that samples from it, and how to load one.

Everything that ditopt measures or verifies, it measures on this loop. It knows nothing about the
sampler: it hands it a callable in the model's place and watches the calls.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditopt.calls import CallRecorder, CallTrace
from ditopt.calls import record_calls as record_calls
from ditopt.errors import DitoptError, WorkloadError, did_you_mean
from ditopt.pipelines import find_denoisers, load_pipeline, pipeline_sampler
from ditopt.runtime.session import implied_session

if TYPE_CHECKING:
    import numpy as np

    from ditopt.layout import TokenLayout

Denoiser = Callable[..., Any]


@dataclass(frozen=True)
class Workload:
    """A model and the denoising loop around it.

    Attributes:
        model: the denoiser, or a mapping of names to denoisers where the loop has several.
        sample: `sample(model, seed)` runs the whole loop with the callable (or the mapping of
            callables) it is given, reads no attributes of it, and returns the result tensor. Equal
            seeds give equal results.
        layout: token grid and text span where inference fails; or a function of the call's inputs.
        frames: turns the result into uint8 pictures [F, H, W, 3].
        data_range: width of the result's value range, for PSNR; see `ditopt.metrics`.
        name: what to call the workload in reports.
        origin: the command-line argument it was loaded from, with an absolute path.
    """

    model: nn.Module | Mapping[str, nn.Module]
    sample: Callable[[Any, int], Tensor]
    layout: TokenLayout | Callable[[Mapping[str, Any]], TokenLayout] | None = None
    frames: Callable[[Tensor], np.ndarray[Any, np.dtype[np.uint8]]] | None = None
    data_range: float | None = None
    name: str | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        named = self.model if isinstance(self.model, Mapping) else {"model": self.model}
        if not named:
            raise WorkloadError(
                "Workload.model is an empty mapping; expected at least one denoiser"
            )
        for name, module in named.items():
            if not isinstance(module, nn.Module):
                raise WorkloadError(
                    f"Workload.model: expected a torch.nn.Module for {name!r}, "
                    f"got {type(module).__name__}"
                )
        if not callable(self.sample):
            raise WorkloadError("Workload.sample must be a function sample(model, seed)")
        if self.data_range is not None and not self.data_range > 0:
            raise WorkloadError(f"Workload.data_range must be positive, got {self.data_range}")

    @property
    def models(self) -> dict[str, nn.Module]:
        """The denoisers by name; a single one is called `model`."""
        return dict(self.model) if isinstance(self.model, Mapping) else {"model": self.model}

    @property
    def title(self) -> str:
        """The name, or the class of the first denoiser."""
        return self.name or type(next(iter(self.models.values()))).__name__

    def parts(self) -> dict[str, Workload]:
        """One workload for each denoiser; the others stay as they are in its loop.

        A pipeline of several experts (Wan2.2) is profiled and planned part by part. Each plan is
        verified with the other experts dense, so errors add up where all plans are used together.
        """

        def part(name: str) -> Workload:
            def sample(model: Denoiser, seed: int) -> Tensor:
                return self.sample({**self.models, name: model}, seed)

            origin = None if self.origin is None else f"{self.origin}@{name}"
            title = f"{self.title}: {name}"
            return replace(self, model=self.models[name], sample=sample, name=title, origin=origin)

        if not isinstance(self.model, Mapping):
            return {"model": self}
        return {name: part(name) for name in self.model}

    def run(self, seed: int, models: Mapping[str, Denoiser] | None = None) -> Tensor:
        """Run the loop once, without gradients, as one sampling run (`ditopt.session`).

        Args:
            seed: seed of the noise and of everything else random in the loop.
            models: callables to use in place of the denoisers, all of them, by name.

        Returns:
            The result tensor, on whatever device the loop left it.

        Raises:
            WorkloadError: a model in training mode, a result that is no finite tensor.
        """
        for name, module in self.models.items():
            if module.training:
                raise WorkloadError(
                    f"{name!r} is in training mode",
                    remedy="ditopt optimizes inference; call model.eval() first.",
                )
        chosen: Mapping[str, Denoiser] = self.models if models is None else models
        given = chosen if isinstance(self.model, Mapping) else chosen["model"]
        with torch.no_grad(), implied_session():
            result = self.sample(given, seed)
        if not isinstance(result, Tensor):
            raise WorkloadError(
                f"sample(model, seed) returned {type(result).__name__}; expected a torch.Tensor"
            )
        if result.numel() == 0 or not bool(torch.isfinite(result).all()):
            raise WorkloadError(
                f"the result of seed {seed} is empty or has NaN or infinite values",
                remedy="`ditopt inspect` names the model call that first goes wrong.",
            )
        return result.detach()

    def trace(self, seed: int = 0) -> dict[str, CallTrace]:
        """Run the loop once with the denoisers as they are and describe the calls of each."""
        recorders = {name: CallRecorder(module, name) for name, module in self.models.items()}
        with ExitStack() as stack:
            for recorder in recorders.values():
                stack.enter_context(recorder.recording())
            self.run(seed)
        return {name: recorder.trace() for name, recorder in recorders.items()}

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        calls: Sequence[Mapping[str, Any]],
        *,
        layout: TokenLayout | Callable[[Mapping[str, Any]], TokenLayout] | None = None,
        frames: Callable[[Tensor], np.ndarray[Any, np.dtype[np.uint8]]] | None = None,
        data_range: float | None = None,
        name: str | None = None,
    ) -> Workload:
        """A workload of a diffusers pipeline.

        Args:
            pipe: the pipeline; its denoisers are the components `transformer`, `transformer_2`, ...
            calls: keyword arguments of one call each (prompts, prompt_embeds, images, sizes).
                Seed s uses `calls[s % len(calls)]`, so several prompts spread over the seeds. The
                result is the latent unless a call names another `output_type`.
            layout: as for `Workload`.
            frames: as for `Workload`.
            data_range: as for `Workload`.
            name: as for `Workload`; the pipeline's class by default.
        """
        if isinstance(calls, Mapping) or not calls:
            raise WorkloadError(
                "from_pipeline(pipe, calls): calls must be a list of dicts, one per call",
                remedy='Write calls=[{"prompt": "..."}].',
            )
        denoisers = find_denoisers(pipe)
        model = denoisers if len(denoisers) > 1 else next(iter(denoisers.values()))
        sample = pipeline_sampler(pipe, calls)
        return cls(model, sample, layout, frames, data_range, name or type(pipe).__name__)


def load_workload(spec: str) -> Workload:
    """The workload that a command-line argument names.

    Args:
        spec: `path/to/file.py[:function]`, a function without arguments that returns a Workload
            (`workload` by default), or `diffusers:PATH`, a folder with a saved pipeline. `@NAME`
            behind either means one of several denoisers, as in `Workload.parts`.

    Raises:
        WorkloadError: the file or function is missing, fails, or returns something else.
    """
    whole, _, denoiser = spec.rpartition("@")
    if whole.endswith(".py") or ".py:" in whole or whole.startswith("diffusers:"):
        parts = load_workload(whole).parts()
        if denoiser not in parts:
            remedy = did_you_mean(denoiser, parts)
            raise WorkloadError(f"{whole} has no denoiser {denoiser!r}", remedy=remedy)
        return parts[denoiser]
    if spec.startswith("diffusers:"):
        folder = spec.removeprefix("diffusers:")
        loaded = Workload.from_pipeline(*load_pipeline(folder))
        return replace(loaded, origin=f"diffusers:{Path(folder).resolve()}")
    path, _, name = spec.rpartition(":") if not spec.endswith(".py") else (spec, "", "workload")
    if not path.endswith(".py"):
        raise WorkloadError(
            f"cannot read {spec!r} as a workload",
            remedy="Expected path/to/file.py[:function] or diffusers:PATH.",
        )
    module = _import_file(Path(path))
    name = name or "workload"
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise WorkloadError(f"{path} has no function {name!r}", remedy=did_you_mean(name, own))
    try:
        workload = function()
    except DitoptError:
        raise
    except Exception as error:
        raise WorkloadError(f"{spec}: {name}() failed: {_cause(error)}") from error
    if not isinstance(workload, Workload):
        raise WorkloadError(
            f"{spec}: {name}() returned {type(workload).__name__}; expected a ditopt.Workload"
        )
    return replace(workload, origin=f"{Path(path).resolve()}:{name}")


def _import_file(path: Path) -> ModuleType:
    """Run a Python file as a module, with its folder importable as for `python file.py`."""
    if not path.is_file():
        raise WorkloadError(f"no such file: {str(path)!r}")
    resolved = path.resolve()
    # Dynamo looks functions up by module name, so the name must be the file's own
    name = f"ditopt_workload_{path.stem}_{hashlib.sha256(bytes(resolved)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise WorkloadError(f"{str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(resolved.parent) not in sys.path:
        sys.path.insert(0, str(resolved.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise WorkloadError(f"{path} cannot be imported: {_cause(error)}") from error
    return module


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

"""Diffusers pipelines as workloads: the denoiser is exchanged for the time of one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditopt.errors import BackendUnavailable, WorkloadError

_PROMPTS = (
    "a red fox walking through fresh snow",
    "a harbour at sunrise, fishing boats, calm water",
    "an old clockmaker at his bench, warm light",
    "a city street in the rain at night, neon signs",
)


class _Stand:
    """Looks like `module` to a pipeline (attributes, `isinstance`) but calls `forward`."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        vars(self).update(_module=module, _forward=forward)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pipelines find their device by isinstance(component, nn.Module)
        return type(self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)


def find_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's denoisers by component name: `transformer`, `transformer_2`, ...

    Raises:
        WorkloadError: there is none; the message lists the components that there are.
    """
    components: dict[str, Any] = getattr(pipe, "components", {})
    found = {
        name: component
        for name, component in components.items()
        if name.startswith("transformer") and isinstance(component, nn.Module)
    }
    if not found:
        raise WorkloadError(
            f"{type(pipe).__name__} has no component named 'transformer' "
            f"(components: {', '.join(components) or 'none'})",
            remedy="Build ditopt.Workload(model, sample) yourself for this pipeline.",
        )
    return found


def pipeline_sampler(
    pipe: Any, calls: Sequence[Mapping[str, Any]]
) -> Callable[[Callable[..., Any] | Mapping[str, Callable[..., Any]], int], Tensor]:
    """A `sample(models, seed)` that calls the pipeline with `calls[seed % len(calls)]`.

    The seed feeds the pipeline's `generator`; `output_type` is `"latent"` unless a call names one.
    """
    denoisers = find_denoisers(pipe)
    accepted = inspect.signature(pipe.__call__).parameters
    for number, call in enumerate(calls):
        unknown = [name for name in call if name not in accepted]
        if unknown:
            raise WorkloadError(
                f"call {number}: {type(pipe).__name__} takes no argument {unknown[0]!r}",
                remedy=f"It takes {', '.join(accepted)}.",
            )

    def sample(models: Callable[..., Any] | Mapping[str, Callable[..., Any]], seed: int) -> Tensor:
        chosen = models if isinstance(models, Mapping) else dict.fromkeys(denoisers, models)
        # a CPU generator gives the same noise on every device
        defaults = {"generator": torch.Generator("cpu").manual_seed(seed), "output_type": "latent"}
        defaults = {name: value for name, value in defaults.items() if name in accepted}
        with _exchanged(pipe, denoisers, chosen):
            output = pipe(**{**defaults, **calls[seed % len(calls)]}, return_dict=False)
        return _as_tensor(output, type(pipe).__name__)

    return sample


@contextmanager
def _exchanged(
    pipe: Any, denoisers: Mapping[str, nn.Module], models: Mapping[str, Callable[..., Any]]
) -> Iterator[None]:
    """Put stand-ins for the denoisers into the pipeline, without its progress bar."""
    # Straight into the instance: the pipeline's own __setattr__ would rewrite its config.
    attributes = vars(pipe)
    bar = attributes.get("_progress_bar_config")
    attributes["_progress_bar_config"] = {**(bar or {}), "disable": True}
    for name, module in denoisers.items():
        if models[name] is not module:
            attributes[name] = _Stand(module, models[name])
    try:
        yield
    finally:
        attributes.update(denoisers)
        if bar is None:
            del attributes["_progress_bar_config"]
        else:
            attributes["_progress_bar_config"] = bar


def _as_tensor(output: Any, pipeline: str) -> Tensor:
    """The first result as a tensor; arrays are converted, pictures refused."""
    while isinstance(output, list | tuple) and output:
        output = output[0]
    if isinstance(output, np.ndarray):
        return torch.from_numpy(output)
    if isinstance(output, Tensor):
        return output
    raise WorkloadError(
        f"{pipeline} returned {type(output).__name__}, which is no tensor",
        remedy='Leave output_type out of the call, or say "latent", "pt" or "np".',
    )


def load_pipeline(path: str) -> tuple[Any, list[dict[str, Any]]]:
    """A saved pipeline and calls for it: four built-in prompts, or four class labels.

    Raises:
        WorkloadError: no pipeline is saved there, it cannot be loaded, or its calls need more.
        BackendUnavailable: diffusers is not installed.
    """
    if not (Path(path) / "model_index.json").is_file():
        raise WorkloadError(
            f"no diffusers pipeline at {path!r}: it has no model_index.json",
            remedy="Give the folder that pipe.save_pretrained(...) wrote.",
        )
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise BackendUnavailable(
            "diffusers is not installed", remedy="Run: pip install 'ditopt[diffusers]'"
        ) from error
    try:
        pipe = DiffusionPipeline.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise WorkloadError(f"cannot load the pipeline at {path!r}: {error}") from error
    accepted = inspect.signature(pipe.__call__).parameters
    if "prompt" in accepted:
        calls: list[dict[str, Any]] = [{"prompt": prompt} for prompt in _PROMPTS]
    elif "class_labels" in accepted:
        calls = [{"class_labels": [label]} for label in (207, 360, 387, 974)]
    else:
        raise WorkloadError(
            f"{type(pipe).__name__} takes neither 'prompt' nor 'class_labels'",
            remedy="Write a Python file with a function workload() that gives its calls.",
        )
    if torch.cuda.is_available():
        pipe.to("cuda", torch.bfloat16)
    return pipe, calls

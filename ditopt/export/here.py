"""Whether an engine can run in this process: torch's version, the device, its capability."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ditopt.errors import EngineError

if TYPE_CHECKING:
    from ditopt.export.manifest import Manifest


def check_environment(manifest: Manifest) -> None:
    """Compare what the engine was made for with what is here.

    Raises:
        EngineError: another version of torch, no CUDA device, or another kind of GPU.
    """
    if manifest.format == "onnx":
        if manifest.device != "cpu":
            raise EngineError(
                "device: here ONNX models run on the CPU, this one takes its inputs elsewhere",
                remedy="Run it in a runtime of that device, or export to pt2.",
            )
        return  # a portable file
    made, here = str(manifest.environment.get("torch")), str(torch.__version__)
    if made.split(".")[:2] != here.split(".")[:2]:
        raise EngineError(
            f"environment.torch: the engine was compiled for torch {made}, this is {here}",
            remedy="Export it again with this version; native programs do not move between them.",
        )
    if manifest.device == "cuda":
        if not torch.cuda.is_available():
            raise EngineError("device: the engine needs a CUDA device, and there is none")
        made, here = str(manifest.environment.get("capability")), _capability()
        if made != here:
            raise EngineError(
                f"environment.capability: compiled for compute capability {made}, this GPU has "
                f"{here}",
                remedy="Export it again on this kind of GPU.",
            )


def _capability() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"

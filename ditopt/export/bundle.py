"""The folder of an engine: written beside its place and renamed, read with every hash checked."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from ditopt.errors import EngineError, FileError, PlanError
from ditopt.export.manifest import MANIFEST, PLAN, WEIGHTS, Manifest
from ditopt.export.schema import FileRecord, TensorSpec
from ditopt.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

MAX_MANIFEST_BYTES = 64 << 20

_ALIGNMENT = 64  # bytes; what vector loads of native programs may assume
_REMEDY = "Export the engine anew, or copy the whole folder again."


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block succeeds.

    An older engine at `path` is replaced; any other content is refused. On an error nothing is
    left behind and what stood there is untouched.

    Raises:
        FileError: the place cannot be written.
    """
    if path.exists() and not (path.is_dir() and _replaceable(path)):
        raise FileError(f"{str(path)!r} exists and is not an engine; it is left as it is")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.resolve().parent))
    except OSError as error:
        raise FileError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except OSError as error:
        raise FileError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replaceable(path: Path) -> bool:
    return (path / MANIFEST).is_file() or not any(path.iterdir())


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Hash and size of every file of a new bundle but its manifest, by relative name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {
        p.relative_to(folder).as_posix(): FileRecord(sha256=_sha256(p), nbytes=p.stat().st_size)
        for p in files
    }


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the weights, each contiguous and with memory of its own."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}
    safetensors.torch.save_file(plain, str(folder / WEIGHTS))
    (folder / WEIGHTS).chmod(0o644)  # it comes out readable by the owner alone


def read_manifest(folder: Path, expect_sha256: str | None = None) -> Manifest:
    """The manifest of a bundle, checked but for the files that it names.

    Raises:
        EngineError: missing, malformed, or not the one that was expected.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise EngineError(f"{MANIFEST} has more than {MAX_MANIFEST_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(
            f"{str(folder)!r} is no engine: cannot read {MANIFEST}: {error.strerror}"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if expect_sha256 is not None and found != expect_sha256.lower():
        raise EngineError(
            f"{MANIFEST}: its sha256 is {found}, expected {expect_sha256}",
            remedy="This is another engine than the one that was pinned.",
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise EngineError(f"{MANIFEST} is not a text: {error}", remedy=_REMEDY) from None
    return Manifest.from_text(text)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its record.

    Raises:
        EngineError: missing, of another size, changed, or outside of the folder.
    """
    root = folder.resolve()
    for name, record in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(root):
            raise EngineError(f"files.{name}: leads out of the engine's folder", remedy=_REMEDY)
        try:
            size = path.stat().st_size
            if size != record.nbytes:
                raise EngineError(
                    f"files.{name}: has {size} bytes, expected {record.nbytes}", remedy=_REMEDY
                )
            if _sha256(path) != record.sha256:
                raise EngineError(
                    f"files.{name}: its contents were changed (sha256 differs)", remedy=_REMEDY
                )
        except OSError as error:
            raise EngineError(f"files.{name}: {error.strerror}", remedy=_REMEDY) from error


def load_plan(folder: Path, manifest: Manifest) -> Plan:
    """The plan that the programs were compiled with.

    Raises:
        EngineError: it is no plan, or has other phases than the wiring.
    """
    try:
        plan = Plan.load(folder / PLAN)
    except (PlanError, FileError) as error:
        raise EngineError(f"plan: {error.message}", remedy=_REMEDY) from error
    found, phases = len(plan.phases), len(manifest.wiring.bodies)
    if found != phases:
        raise EngineError(f"plan: {PLAN} has {found} phases, the wiring {phases}", remedy=_REMEDY)
    return plan


def load_tensors(
    folder: Path, specs: Mapping[str, TensorSpec], device: torch.device
) -> dict[str, Tensor]:
    """The stored tensors on `device`, with the strides that the programs were compiled for.

    Raises:
        EngineError: the file is no safetensors file or does not hold what the manifest says.
    """
    loaded: dict[str, Tensor] = {}
    if not specs:
        return loaded
    try:
        with safetensors.safe_open(str(folder / WEIGHTS), framework="pt") as file:
            names = set(file.keys())
            for name in specs.keys() ^ names:
                where = "the manifest" if name in names else WEIGHTS
                raise EngineError(f"tensors.{name}: {where} does not know it", remedy=_REMEDY)
            for name, spec in specs.items():
                loaded[name] = _place(name, file.get_tensor(name), spec, device)
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{WEIGHTS}: not a safetensors file: {error}", remedy=_REMEDY) from error
    return loaded


def _place(name: str, value: Tensor, spec: TensorSpec, device: torch.device) -> Tensor:
    if tuple(value.shape) != spec.shape or value.dtype != spec.torch_dtype:
        raise EngineError(
            f"tensors.{name}: expected {spec}, {WEIGHTS} holds "
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}",
            remedy=_REMEDY,
        )
    target = device if spec.device == device.type else torch.device(spec.device)
    if (
        target.type == "cpu"
        and value.stride() == spec.stride
        and value.data_ptr() % _ALIGNMENT == 0
    ):
        return value
    placed = torch.empty_strided(spec.shape, spec.stride, dtype=value.dtype, device=target)
    return placed.copy_(value)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

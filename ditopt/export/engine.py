"""`Engine`: an exported model, loaded; it is called as the model was.

    engine = ditopt.Engine.load("engine/")
    pipe.transformer = engine

The programs are native code: load only engines that you trust. Hashes tell that a file is damaged,
not that it is honest; `expect_sha256` pins the very manifest that you know.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditopt import fingerprint
from ditopt.assembly import BoundPiece, assemble, function_of
from ditopt.capture import Captured, Input
from ditopt.errors import DitoptWarning, EngineError
from ditopt.export.arguments import Arguments
from ditopt.export.bundle import check_files, load_plan, load_tensors, read_manifest
from ditopt.export.here import check_environment
from ditopt.export.native import Native, checked, load_native, with_weights
from ditopt.export.values import Result, rebuild
from ditopt.gating import runtime_gate
from ditopt.linker import plan_schedule
from ditopt.runtime import InputRoles, StepRuntime, TrajectoryTracker
from ditopt.runtime.memo import Memo
from ditopt.stack import Stack

if TYPE_CHECKING:
    from ditopt.export.manifest import Manifest
    from ditopt.export.wiring import Step
    from ditopt.plan import Plan
    from ditopt.runtime import Gate, Programs

_NO_GRAPH = Captured((), (), (), (), 0)
"""An engine's model has no collectives whose ranks would have to agree."""


class Engine:
    """An exported model.

    Attributes:
        manifest: what was exported.
        config: the model's `config`, members as attributes too.
        dtype: of the model's parameters.
        device: where it runs.
        plan: the plan that it was exported with, or None.
    """

    def __init__(
        self,
        manifest: Manifest,
        natives: list[Native],
        tensors: Mapping[str, Tensor],
        plan: Plan | None,
        device: torch.device,
    ) -> None:
        self.manifest = manifest
        self.plan = plan
        self.config = Result(manifest.config)
        self.dtype: torch.dtype = getattr(torch, manifest.dtype)
        self.device = device
        self._tensors = dict(tensors)
        self._natives = natives
        self._arguments = Arguments(manifest.call)
        self._rebuild = rebuild(manifest.call.result)
        self._runtime = self._link()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        expect_sha256: str | None = None,
        *,
        verify_borders: bool = False,
    ) -> Engine:
        """Load an engine for this process.

        Args:
            path: folder that `ditopt export` wrote.
            expect_sha256: sha256 of its manifest, where you know it.
            verify_borders: compare what passes between programs with the manifest, in each call.

        Raises:
            EngineError: damaged, edited, or made for another version or device.
        """
        folder = Path(path)
        manifest = read_manifest(folder, expect_sha256)
        check_environment(manifest)
        check_files(folder, manifest)
        device = torch.device(manifest.device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        tensors = load_tensors(folder, manifest.tensors, device)
        plan = None if manifest.plan is None else load_plan(folder, manifest)
        natives = [load_native(folder / program.file) for program in manifest.programs]
        if verify_borders:
            pairs = zip(natives, manifest.programs, strict=True)
            natives = [checked(native, program) for native, program in pairs]
        return cls(manifest, natives, tensors, plan, device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model, with the arguments that its forward takes.

        Raises:
            EngineError: an input of another shape, dtype or device, or another value of an
                argument that was fixed; names it.
        """
        return self._rebuild(list(self._runtime(*self._arguments.fit(args, kwargs))))

    forward = __call__

    def parameters(self) -> Iterator[Tensor]:
        """The stored tensors, for code that asks a model for its dtype or device."""
        return iter(self._tensors.values())

    def buffers(self) -> Iterator[Tensor]:
        """None: everything stored counts as a parameter."""
        return iter(())

    def modules(self) -> Iterator[Any]:
        """Itself, for code that walks through a model."""
        yield self

    def eval(self) -> Engine:
        """Itself; an engine only infers."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Engine:
        """Itself where nothing would move or change.

        Raises:
            EngineError: another device or dtype.
        """
        for wanted in (*args, *kwargs.values()):
            device = torch.device(wanted) if isinstance(wanted, str | torch.device) else None
            moves = device is not None and device.type != self.device.type
            if moves or (isinstance(wanted, torch.dtype) and wanted != self.dtype):
                raise EngineError(
                    f"the engine runs in {self.dtype} on {self.device}, not {wanted}",
                    remedy="Export it again from a model with that dtype, on that device.",
                )
        return self

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Does nothing: diffusers names guidance branches by it, an engine finds them itself."""
        yield

    def _link(self) -> StepRuntime:
        programs = self._programs()
        schedule = tracker = None
        if self.plan is not None:
            schedule = plan_schedule(self.plan, self._gate(), cached=self.manifest.cached)
            if not schedule.trivial:
                tracker = TrajectoryTracker(schedule, model=self.manifest.name)
        runtime = StepRuntime(programs, schedule, tracker)
        runtime.artifact.own(self._tensors.values())
        return runtime

    def stand_for(self, module: nn.Module) -> bool:
        """Take the place of a workload's denoiser; `ditopt.stats(module)` then counts its calls.

        Returns:
            Whether the engine was made from a model of this architecture.
        """
        if fingerprint.architecture(module) != self.manifest.architecture:
            return False
        if fingerprint.weights(module) != self.manifest.weights:
            warnings.warn(
                "the engine was exported from other weights than the workload's model has",
                DitoptWarning,
                stacklevel=2,
            )
        self._runtime.artifact.own(module.parameters())
        return True

    def _programs(self) -> Programs:
        wiring, inputs = self.manifest.wiring, self.manifest.call.inputs
        names = [item.name for item in inputs]
        known = [Input(name, "user", None) for name in names]
        known += [Input(f"kept.{k}", "hoisted", None) for k in range(wiring.hoisted)]
        captured = Captured(tuple(known), (), (), wiring.returned, wiring.slots)
        memos = [
            Memo(
                function_of(self._pieces(record.steps), record.outputs),
                inputs=record.inputs,
                weights=(),
                outputs=record.outputs,
                device=self.device,
            )
            for record in wiring.kept
        ]
        before, after = self._pieces(wiring.before), self._pieces(wiring.after)
        by_phase = [[before, self._pieces(body), after] for body in wiring.bodies]
        stack = None
        if wiring.stack is not None:
            stack = Stack(0, 0, wiring.stack.outputs, wiring.stack.bases)
        around = [memos[k] for k in wiring.kept_always]
        kept = [[memos[k] for k in phase] for phase in wiring.kept_by_phase]
        probe = None
        if wiring.probe is not None:
            probe = (wiring.probe.cuts, wiring.probe.streams)
        return assemble(captured, by_phase, stack, self._roles(names), (around, kept), probe)

    def _gate(self) -> Gate | None:
        if self.plan is None or self.plan.cache is None or not self.manifest.cached:
            return None
        wiring = self.manifest.wiring
        bases = () if wiring.stack is None else wiring.stack.bases
        return runtime_gate(self.plan.cache, _NO_GRAPH, Stack(0, 0, (), bases), None)

    def _pieces(self, steps: tuple[Step, ...]) -> list[BoundPiece]:
        return [self._piece(step) for step in steps]

    def _piece(self, step: Step) -> BoundPiece:
        call: Callable[..., Any]
        call, slots = with_weights(self._natives[step.program], step, self._tensors)
        return BoundPiece(call, slots, (), step.outputs, step.free, step.kernels)

    def _roles(self, names: list[str]) -> InputRoles:
        if self.plan is None:
            return InputRoles.from_names(names, timestep=None, varying=())
        sampler = self.plan.sampler
        return InputRoles.from_names(names, timestep=sampler.timestep, varying=sampler.varying)

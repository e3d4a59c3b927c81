"""Does a manifest's wiring make sense: every program finds exactly what it was compiled for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from ditopt.errors import EngineError

if TYPE_CHECKING:
    from ditopt.export.manifest import Manifest
    from ditopt.export.schema import Slot, TensorSpec
    from ditopt.export.wiring import Kept, Probe, Step


class WiringCheck:
    """Runs the wiring on specs: each program must find exactly what it was compiled for."""

    def __init__(self, manifest: Manifest, remedy: str) -> None:
        self.manifest = manifest
        self.remedy = remedy
        self.wiring = manifest.wiring
        self.inputs = [item.spec for item in manifest.call.inputs]

    def run(self) -> None:
        """Check the whole wiring.

        Raises:
            EngineError: a reference to nothing, or a value that does not fit; names the field.
        """
        wiring, phases = self.wiring, len(self.wiring.bodies)
        if len(self.inputs) + wiring.hoisted > wiring.slots:
            self._fail("wiring.slots", f"{wiring.slots} slots do not hold the inputs")
        if len(wiring.kept_by_phase) != phases:
            self._fail("wiring.kept_by_phase", f"expected {phases} lists, one per phase")
        if wiring.probe is not None and len(wiring.probe.cuts) != phases:
            self._fail("wiring.probe.cuts", f"expected {phases}, one per phase")
        schedule = self.manifest.schedule
        if schedule is not None:
            if len(schedule.phases) != len(schedule.sources):
                self._fail("schedule.sources", f"expected {len(schedule.phases)} lists")
            if any(phase >= phases for phase in schedule.phases):
                self._fail("schedule.phases", f"there are {phases} phases")
        for phase in range(phases):
            self._run_phase(phase)
        # Without a cache nothing is skipped: phases alone have a stack of everything, no bases.
        if wiring.stack is not None and self.manifest.cached:
            self._run_skip(wiring.stack.outputs, wiring.stack.bases)

    def _fresh(self, kept: Sequence[int], field: str) -> dict[int, TensorSpec]:
        env = dict(enumerate(self.inputs))
        first, last = len(self.inputs), len(self.inputs) + self.wiring.hoisted
        for number in kept:
            if number >= len(self.wiring.kept):
                self._fail(field, f"there is no wiring.kept[{number}]")
            record = self.wiring.kept[number]
            where = f"wiring.kept[{number}]"
            own = self._of(record, env, where)
            for slot in record.outputs:
                if not first <= slot < last:
                    self._fail(f"{where}.outputs", f"slot {slot} is not one of the hoisted ones")
                if slot not in own:
                    self._fail(f"{where}.outputs", f"nothing fills slot {slot}")
                env[slot] = own[slot]
        return env

    def _of(self, record: Kept, env: dict[int, TensorSpec], where: str) -> dict[int, TensorSpec]:
        for slot in record.inputs:
            if slot not in env:
                self._fail(f"{where}.inputs", f"slot {slot} is not filled yet")
        return self._steps(record.steps, dict(env), f"{where}.steps")

    def _run_phase(self, phase: int) -> None:
        wiring = self.wiring
        env = self._fresh(wiring.kept_by_phase[phase], f"wiring.kept_by_phase[{phase}]")
        env = self._steps(wiring.before, env, "wiring.before")
        if wiring.probe is not None:
            self._run_probe(wiring.probe, phase, dict(env))
        env = self._steps(wiring.bodies[phase], env, f"wiring.bodies[{phase}]")
        if wiring.stack is not None:
            self._need(wiring.stack.outputs, env, "wiring.stack.outputs")
        env = self._steps(wiring.after, env, "wiring.after")
        self._need(wiring.returned, env, "wiring.returned")

    def _run_probe(self, probe: Probe, phase: int, env: dict[int, TensorSpec]) -> None:
        cut, body = probe.cuts[phase], self.wiring.bodies[phase]
        if cut > len(body):
            self._fail(f"wiring.probe.cuts[{phase}]", f"the body has {len(body)} steps")
        before = dict(env)
        env = self._steps(body[:cut], env, f"wiring.bodies[{phase}]")
        for number, (slot, base) in enumerate(probe.streams):
            field = f"wiring.probe.streams[{number}]"
            self._need([slot], env, field)
            if base is None:
                continue
            self._need([base], before, field)
            if before[base].shape != env[slot].shape:
                self._fail(field, f"slot {base} has another shape than slot {slot}")

    def _run_skip(self, outputs: Sequence[Slot], bases: Sequence[Slot | None]) -> None:
        wiring = self.wiring
        if len(outputs) != len(bases):
            self._fail("wiring.stack.bases", f"expected {len(outputs)}, one per output")
        full = self._fresh(wiring.kept_by_phase[0], "wiring.kept_by_phase[0]")
        full = self._steps(wiring.before, full, "wiring.before")
        full = self._steps(wiring.bodies[0], full, "wiring.bodies[0]")
        env = self._fresh(wiring.kept_always, "wiring.kept_always")
        env = self._steps(wiring.before, env, "wiring.before")
        for slot, base in zip(outputs, bases, strict=True):
            if base is not None and env.get(base) is None:
                self._fail("wiring.stack.bases", f"slot {base} is not filled before the stack")
            if base is not None and env[base].shape != full[slot].shape:
                self._fail("wiring.stack.bases", f"slot {base} has another shape than slot {slot}")
            env[slot] = full[slot]
        self._need(wiring.returned, self._steps(wiring.after, env, "wiring.after"), "returned")

    def _steps(
        self, steps: Sequence[Step], env: dict[int, TensorSpec], where: str
    ) -> dict[int, TensorSpec]:
        for number, step in enumerate(steps):
            field = f"{where}[{number}]"
            if step.program >= len(self.manifest.programs):
                self._fail(f"{field}.program", f"there is no program {step.program}")
            program = self.manifest.programs[step.program]
            for kind, given, wanted in (
                ("inputs", step.inputs, program.inputs),
                ("outputs", step.outputs, program.outputs),
            ):
                if len(given) != len(wanted):
                    self._fail(f"{field}.{kind}", f"expected {len(wanted)}, got {len(given)}")
            for position, found in enumerate(self._arguments(step, env, field)):
                if not program.inputs[position].alike(found):
                    self._fail(
                        f"{field}.inputs[{position}]",
                        f"the program takes {program.inputs[position]}, this is {found}",
                    )
            for slot, spec in zip(step.outputs, program.outputs, strict=True):
                if not len(self.inputs) <= slot < self.wiring.slots:
                    self._fail(f"{field}.outputs", f"slot {slot} is out of range")
                env[slot] = spec
            for slot in step.free:
                if env.pop(slot, None) is None or slot < len(self.inputs) + self.wiring.hoisted:
                    self._fail(f"{field}.free", f"slot {slot} is not one between programs")
        return env

    def _arguments(
        self, step: Step, env: dict[int, TensorSpec], field: str
    ) -> Iterator[TensorSpec]:
        for position, source in enumerate(step.inputs):
            known = env.get(source) if isinstance(source, int) else None
            if isinstance(source, str):
                known = self.manifest.tensors.get(source)
            if known is None:
                self._fail(f"{field}.inputs[{position}]", f"nothing fills {source!r}")
            yield known

    def _need(self, slots: Sequence[int], env: dict[int, TensorSpec], field: str) -> None:
        for slot in slots:
            if slot not in env:
                self._fail(field, f"nothing fills slot {slot}")

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise EngineError(f"{field}: {problem}", remedy=self.remedy)

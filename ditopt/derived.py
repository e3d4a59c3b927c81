"""All weights that the programs of one model read in place of the model's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ditopt.weights import DerivedTensors, FusedTensor

if TYPE_CHECKING:
    from ditopt.passes.base import LinearOperand
    from ditopt.quantization import LinearRule

_Key = tuple[tuple[int, ...], tuple[int, ...], "LinearRule"]

Reader = Callable[[Sequence[Any]], Tensor]


class DerivedWeights:
    """Makes each derived weight once, however many programs read it.

    Attributes:
        tensors: all of them.
    """

    def __init__(self) -> None:
        self.tensors: list[DerivedTensors] = []
        self._fused: dict[tuple[int, ...], FusedTensor] = {}
        self._quantized: dict[_Key, DerivedTensors] = {}
        self._channels: dict[_Key, int] = {}

    def fused(self, slots: tuple[int, ...]) -> Reader:
        """The weights in `slots` one below the other."""
        if slots not in self._fused:
            self._fused[slots] = FusedTensor(slots, release=False)
            self.tensors.append(self._fused[slots])
        return self._fused[slots].get

    def operand(
        self, spec: LinearOperand, slots: Sequence[int], statistics: Mapping[str, Tensor]
    ) -> Reader:
        """One of the tensors that a quantized layer reads.

        Args:
            spec: which.
            slots: of the inputs that the positions in `spec` count.
            statistics: of the layer's input channels.
        """
        from ditopt.quantization.layer import derive

        weights, biases = (
            tuple(slots[position] for position in positions)
            for positions in (spec.weights, spec.biases)
        )
        key = (weights, biases, spec.rule)
        if key not in self._quantized:
            count, rule = len(weights), spec.rule

            def make(parts: list[Tensor]) -> Mapping[str, Tensor]:
                self._channels[key] = sum(part.shape[0] for part in parts[:count])
                return derive(rule, parts[:count], parts[count:], statistics)

            self._quantized[key] = DerivedTensors((*weights, *biases), make, release=False)
            self.tensors.append(self._quantized[key])
        return self._quantized[key].reader(spec.name)

    def quantized(self, slot: int | None) -> list[tuple[LinearRule, DerivedTensors, int]]:
        """What replaces the weight in a slot: rule, tensors, and output channels of all merged."""
        return [
            (rule, tensors, self._channels.get(key, 0))
            for key, tensors in self._quantized.items()
            for weights, _, rule in [key]
            if slot in weights
        ]

    def release(self, read: AbstractSet[int]) -> None:
        """Let originals go that nothing but one derived weight reads.

        Args:
            read: slots that programs read themselves.
        """
        readers = Counter(slot for tensors in self.tensors for slot in tensors.slots)
        for tensors in self.tensors:
            tensors.release = all(readers[slot] == 1 and slot not in read for slot in tensors.slots)

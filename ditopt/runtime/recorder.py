"""`CudaRecorder`: records what a function launches into a CUDA graph."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CannotRecord(Exception):
    """A step cannot be a CUDA graph; the message says why."""


class CudaRecorder:
    """Records on a stream of its own, into one memory pool.

    Graphs of one recorder share intermediate memory, so only one of them may run at a time.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._last: torch.cuda.Stream | None = None

    def refuse(self, tensor: Tensor) -> str | None:
        """Why a graph cannot read a tensor, or None."""
        if not tensor.is_cuda:
            return f"one of its inputs lies on {tensor.device}"
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        if tensor.device != self._stream.device:
            return f"its inputs lie on {self._stream.device} and {tensor.device}"
        return None

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """The function's outputs, at addresses of their own, and what computes them again.

        Raises:
            CannotRecord: the function waits for the device, or fails while it is recorded.
        """
        assert self._stream is not None
        torch.cuda.synchronize(self._stream.device)
        with torch.cuda.stream(self._stream):
            try:
                waits = _rehearse(function)
            except Exception as error:
                raise CannotRecord(_first_line(error)) from error
            if waits is not None:
                # A failed recording leaves the allocator in a state that it never quite leaves.
                raise CannotRecord(f"it waits for the device, at {waits}")
            torch.cuda.synchronize(self._stream.device)
            torch.cuda.empty_cache()  # the pool cannot use what the allocator has set aside
            return self._capture(function)

    def _capture(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if not self._alive:  # a pool ends with its last graph and cannot begin again
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                outputs = function()
            except BaseException:
                with suppress(Exception):
                    graph.capture_end()
                raise
            graph.capture_end()
        except Exception as error:
            raise CannotRecord(_first_line(error)) from error
        self._alive.add(graph)
        return outputs, graph.replay

    def order(self) -> None:
        """Wait, on the device, for a replay that another stream has begun."""
        assert self._stream is not None
        current = torch.cuda.current_stream(self._stream.device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def settle(self) -> None:
        """Wait for all replays: the memory of a graph is about to be given back."""
        if self._stream is not None:
            torch.cuda.synchronize(self._stream.device)


def _rehearse(function: Callable[[], Any]) -> str | None:
    """Run the function; where it waits for the device (file and line), or None."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(max(mode, 1))  # at least "warn"
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return f"{Path(waits[0].filename).name}:{waits[0].lineno}" if waits else None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"

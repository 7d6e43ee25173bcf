"""Recording what a call gives a GPU to do, as a CUDA graph, and playing it back in one launch."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch


class CudaRecorder:
    """See decode_steps.Record. What it records shares one pool of memory: only one of them plays at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._warm: set[int] = set()
        """Threads that have computed on the stream of recordings: torch has handles of libraries for each thread."""
        self._kept: list[torch.cuda.CUDAGraph] = []
        """The first of all, and those that failed: torch's allocator asks them for as long as it lives."""

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @cached_property
    def _pool(self) -> Any:  # torch's type of it has no public name
        return torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record ``call``, which neither waits for the device nor reads its memory. Raises RuntimeError."""
        current = torch.cuda.current_stream(self._device)
        stream, graph = self._stream, torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            if threading.get_ident() not in self._warm:
                self._warm_up(call)
            if not self._kept:
                self._open_pool()
            self._capture(graph, call)
        current.wait_stream(stream)
        return graph.replay

    def _warm_up(self, call: Callable[[], None]) -> None:
        """Have libraries ask for what they ask for once on each stream: while it is recorded they can't."""
        call()
        self._stream.synchronize()
        # What the call took on this stream no other call takes again: recordings have their pool.
        torch.cuda.empty_cache()
        self._warm.add(threading.get_ident())

    def _open_pool(self) -> None:
        """Keep a graph that is never played: torch refuses a pool all of whose graphs are gone.

        Outside inference mode, so that the generator's state, which the first graph makes, can be written in either.
        """
        first = torch.cuda.CUDAGraph()
        with torch.inference_mode(mode=False):
            nothing = torch.zeros(1, device=self._device)
            self._capture(first, nothing.zero_)
        self._kept.append(first)

    def _capture(self, graph: torch.cuda.CUDAGraph, call: Callable[[], object]) -> None:
        with _no_collection():
            try:
                # Other threads, which read adapters, may go on with what a recording thread may not.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    call()
                except BaseException:
                    # What this says is that something was refused; the error that is raised says what.
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
            except BaseException:
                self._kept.append(graph)
                raise


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let no garbage be collected: what is freed may be another graph, which asks the device for something."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""How recordings are asked of torch, by a torch of one's own that refuses what the real one does."""

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from manylora.server.kernels.plain.cuda_graph import CudaRecorder

GPU = torch.device("cuda")


class Gpu:
    """What happens on a device: the pools in use, the streams, and what is being recorded."""

    def __init__(self) -> None:
        self.users: Counter[int] = Counter()
        """Graphs of each pool; one that had some and has none is dead."""
        self.current = self.default = Stream(self)
        self.recording: Graph | None = None
        self.emptied = 0
        self.modes: list[bool] = []
        """Whether each recording was begun in inference mode."""


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def wait_stream(self, other: "Stream") -> None:
        assert self.gpu.recording is None

    def synchronize(self) -> None:
        assert self.gpu.recording is None


class Graph:
    gpu: Gpu

    def __init__(self) -> None:
        self.pool: int | None = None
        self.played = 0
        self.refused = False

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert self.gpu.current is not self.gpu.default
        if pool in self.gpu.users and not self.gpu.users[pool]:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.gpu.users[pool] += 1
        self.pool, self.gpu.recording = pool, self
        self.gpu.modes.append(torch.is_inference_mode_enabled())

    def capture_end(self) -> None:
        self.gpu.recording = None
        if self.refused:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.played += 1

    def __del__(self) -> None:
        if self.pool is not None:
            self.gpu.users[self.pool] -= 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, gpu.current = gpu.current, stream
        yield
        gpu.current = before

    def empty_cache() -> None:
        assert gpu.recording is None
        gpu.emptied += 1

    real = torch.zeros

    def zeros(*shape: int, device: torch.device) -> torch.Tensor:
        return real(*shape)

    monkeypatch.setattr(Graph, "gpu", gpu, raising=False)
    fakes: dict[str, Any] = {
        "Stream": lambda device: Stream(gpu),
        "CUDAGraph": Graph,
        "current_stream": lambda device: gpu.current,
        "stream": on,
        "graph_pool_handle": lambda: 7,
        "empty_cache": empty_cache,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "zeros", zeros)
    return gpu


def done_by(call: Callable[[], None]) -> Graph:
    graph: Graph = call.__self__  # type: ignore[attr-defined]
    return graph


def test_a_call_is_tried_once_on_the_stream_and_then_recorded(gpu: Gpu) -> None:
    recorder, recorded = CudaRecorder(GPU), []
    for _ in range(2):
        play = recorder(lambda: recorded.append(gpu.recording is not None))
        play()
        assert done_by(play).played == 1
    assert recorded == [False, True, True]
    assert gpu.emptied == 1


def test_another_thread_tries_it_again(gpu: Gpu) -> None:
    """Its libraries' handles are others."""
    recorder, recorded = CudaRecorder(GPU), []

    def record() -> None:
        recorder(lambda: recorded.append(gpu.recording is not None))

    record()
    thread = threading.Thread(target=record)
    thread.start()
    thread.join()
    assert recorded == [False, True, False, True]


def test_it_goes_on_after_all_recordings_are_dropped(gpu: Gpu) -> None:
    """As when steps of more rows want other outputs: torch refuses a pool that nothing lives in any more."""
    recorder = CudaRecorder(GPU)
    play = recorder(lambda: None)
    del play
    gc.collect()
    assert done_by(recorder(lambda: None)).pool == 7


def test_an_error_is_the_one_that_was_met_first_and_its_graph_stays(gpu: Gpu) -> None:
    """Torch's allocator asks the graph of a failed recording for as long as it lives."""
    recorder = CudaRecorder(GPU)
    recorder(lambda: None)
    before = gpu.users[7]

    def refused() -> None:
        assert gpu.recording is not None
        gpu.recording.refused = True
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder(refused)
    gc.collect()
    assert gpu.recording is None
    assert gc.isenabled()
    assert gpu.users[7] == before + 1
    assert done_by(recorder(lambda: None)).pool == 7


def test_no_garbage_is_collected_meanwhile(gpu: Gpu) -> None:
    seen: list[bool] = []
    CudaRecorder(GPU)(lambda: seen.append(gc.isenabled()))
    assert seen == [True, False]
    assert gc.isenabled()


def test_the_first_of_all_is_recorded_outside_inference_mode(gpu: Gpu) -> None:
    """It makes the generator's state, which could not be written outside inference mode if it were made in it."""
    with torch.inference_mode():
        CudaRecorder(GPU)(lambda: None)
    assert gpu.modes == [False, True]

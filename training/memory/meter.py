"""The peak of a run, as the plan counts it: live tensors on CUDA, the process's resident size on a CPU."""

import re
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PeakMeter:
    """Measures from ``__enter__`` on; read it any time.

    On CUDA the bytes of live tensors (torch.cuda.max_memory_allocated), to be held against a plan's ``tensors_gib``.
    On a CPU the kernel's high-water mark of resident memory, libraries included, against ``total_gib``. Linux can set
    the mark back (clear_refs, proc(5)); where it can't be, the mark is that of the process's whole life.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.start_bytes = 0
        """In use when the measurement began."""

    def __enter__(self) -> "PeakMeter":
        self.reset()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to undo: peaks stay readable."""

    def reset(self) -> None:
        """Begin anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start_bytes = torch.cuda.memory_allocated(self.device)
            return
        with suppress(OSError):
            _CLEAR.write_text(_RESET_PEAK)
        self.start_bytes = psutil.Process().memory_info().rss

    @property
    def peak_bytes(self) -> int:
        """The highest use since the beginning."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_peak()

    @property
    def peak_gib(self) -> float:
        """The highest use in GiB."""
        return self.peak_bytes / (1 << 30)


def _resident_peak() -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    import resource

    # Kibibytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if peak > 1 << 32 else peak * 1024

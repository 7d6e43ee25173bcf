"""The processor cores that this process may use: how many threads pay, and which core each is held on."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUP_OF_SELF = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Cores:
    """What this process may use."""

    physical: tuple[int, ...]
    """One logical processor of each physical core in the affinity mask."""
    quota: int | None
    """Processors' worth of time that the container has, rounded up; None: no limit."""

    @property
    def threads(self) -> int:
        """Threads that pay: hyper-threads share the units that multiply."""
        return max(1, min(len(self.physical), self.quota or len(self.physical)))

    def held(self, threads: int) -> tuple[int, ...] | None:
        """Return the core of each of so many threads, or None where they should be left to the system.

        Held are only threads that take all of the cores: of several processes that share more cores than they use, each
        would hold its threads on the same ones.
        """
        owned = threads == len(self.physical) and (self.quota is None or self.quota >= threads)
        return self.physical if owned and threads > 1 else None


def find_cores() -> Cores:
    """Ask the system."""
    if not hasattr(os, "sched_getaffinity"):
        return Cores(tuple(range(os.cpu_count() or 1)), None)
    return Cores(_one_of_each_core(sorted(os.sched_getaffinity(0))), _quota())


def _one_of_each_core(processors: Sequence[int]) -> tuple[int, ...]:
    first: dict[str, int] = {}
    for processor in processors:
        siblings = _read(TOPOLOGY / f"cpu{processor}" / "topology" / "thread_siblings_list")
        first.setdefault(siblings or str(processor), processor)
    return tuple(first.values())


def _quota() -> int | None:
    """Return the least limit of the control groups (version 2) that this process is in."""
    path = next((line[3:] for line in _read(CGROUP_OF_SELF).splitlines() if line.startswith("0::")), "/")
    group = CGROUPS / path.lstrip("/")
    limits = []
    for folder in (group, *group.parents):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            limits.append(math.ceil(int(quota) / int(period)))
        if folder == CGROUPS:
            break
    return max(1, min(limits)) if limits else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

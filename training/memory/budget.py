"""The memory that a run may use: what is said, or what this machine has."""

from dataclasses import dataclass

from manylora.training.errors import InvalidArgument
from manylora.training.memory.sizes import parse_bytes


@dataclass(frozen=True, slots=True)
class Budget:
    """So much memory, on such a device."""

    device: str
    """cuda or cpu."""
    bytes: int
    source: str
    """Where the figure is from, in words."""

    @property
    def gib(self) -> float:
        """The memory in GiB."""
        return self.bytes / (1 << 30)


def find_budget(gpu: str | None = None, cpu: str | None = None, recipe: str | None = None) -> Budget:
    """Return the budget that was named, or this machine's: its first GPU, or else its memory.

    Raises InvalidArgument when both are named, a size can't be read, or a recipe for GPUs is planned on a CPU.
    """
    if gpu is not None and cpu is not None:
        raise InvalidArgument("--gpu and --cpu are both given: a run is planned for one of them.")
    if recipe is not None and cpu is not None:
        raise InvalidArgument(f"--recipe {recipe} is a recipe for GPUs: give --gpu instead of --cpu.")
    if gpu is not None:
        return Budget("cuda", parse_bytes(gpu), "--gpu")
    if cpu is not None:
        return Budget("cpu", parse_bytes(cpu), "--cpu")
    return Budget("cuda", 80 * 10**9, "an A100-80G, as in Qwen's table") if recipe else this_machine()


def this_machine() -> Budget:
    """Return the memory of this machine's GPU, or what is free for this process, with what it has, on its CPU."""
    import torch

    if torch.cuda.is_available():
        return Budget("cuda", torch.cuda.mem_get_info()[1], f"this machine's {torch.cuda.get_device_name()}")
    import psutil

    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return Budget("cpu", free, "free memory of this machine")

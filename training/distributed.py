"""More than one process: how many there are, and DeepSpeed's and FSDP's configs, which ship and are found by name."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from manylora.training.errors import InvalidArgument
from manylora.training.flags import Flag

CONFIGS = Path(__file__).resolve().parent / "configs"


def world_size() -> int:
    """Return how many processes torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Return whether this process is the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def find_config(name: str) -> Path:
    """Return a config file: where it is said to be, else the shipped one of that name."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = CONFIGS / path.name
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(each.name for each in CONFIGS.iterdir()))
    raise InvalidArgument(f"{name}: there is no such file, and none of that name ships; these do: {names}")


def settle_configs(flags: Sequence[Flag]) -> tuple[list[Flag], list[str]]:
    """Resolve --deepspeed and --fsdp_config; leave out what one process has no use for.

    Raises InvalidArgument where several processes would need DeepSpeed and it isn't installed.
    """
    found: list[Flag] = []
    notes: list[str] = []
    for flag in flags:
        if flag.name == "ddp_backend" and world_size() == 1:
            notes.append(f"--ddp_backend {flag.value()}: one process has nobody to talk to, and needs none")
            continue
        if flag.name not in ("deepspeed", "fsdp_config") or flag.value().lstrip().startswith("{"):
            found.append(flag)
            continue
        config = find_config(flag.value())
        if flag.name == "deepspeed" and not _deepspeed_can_run():
            notes.append(
                f"--deepspeed {flag.value()}: with one process ZeRO has nothing to shard, and deepspeed is not"
                " installed; the run goes on without it"
            )
            continue
        found.append(Flag(flag.name, (str(config),)))
    return found, notes


def _deepspeed_can_run() -> bool:
    if find_spec("deepspeed") is not None:
        return True
    if world_size() > 1:
        raise InvalidArgument(
            f"--deepspeed with {world_size()} processes needs the extra: pip install 'manylora[deepspeed]'"
        )
    return False

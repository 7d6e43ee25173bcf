"""More than one process: how many there are, and DeepSpeed's and FSDP's configs, which ship and are found by name."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from manylora.training.errors import InvalidArgument
from manylora.training.old_flags import flag_name

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


def settle_configs(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Resolve --deepspeed and --fsdp_config; leave DeepSpeed out where it has nothing to shard.

    Raises InvalidArgument where several processes would need DeepSpeed and it isn't installed.
    """
    found: list[str] = []
    notes: list[str] = []
    words = iter(argv)
    for word in words:
        name = flag_name(word)
        if name not in ("deepspeed", "fsdp_config"):
            found.append(word)
            continue
        value = next(words, "")
        if value.lstrip().startswith("{"):
            found += [word, value]
            continue
        config = find_config(value)
        if name == "deepspeed" and not _deepspeed_can_run():
            notes.append(
                f"--deepspeed {value}: with one process ZeRO has nothing to shard, and deepspeed is not installed;"
                " the run goes on without it"
            )
            continue
        found += [word, str(config)]
    return found, notes


def _deepspeed_can_run() -> bool:
    if find_spec("deepspeed") is not None:
        return True
    if world_size() > 1:
        raise InvalidArgument(
            f"--deepspeed with {world_size()} processes needs the extra: pip install 'manylora[deepspeed]'"
        )
    return False

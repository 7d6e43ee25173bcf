"""More than one process: how many there are, and DeepSpeed's and FSDP's configs, which ship and are found by name."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments

from manylora.training.errors import InvalidArgument
from manylora.training.flags import Flag

CONFIGS = Path(__file__).resolve().parent / "configs"


def world_size() -> int:
    """Return how many processes torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Return whether this process is the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def any_process(yes: bool, device: torch.device) -> bool:
    """Return whether ``yes`` is so in any process: what all processes may act on alike. All of them must ask."""
    if world_size() == 1:
        return yes
    found = torch.tensor(int(yes), device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found)


def wants_fsdp(training: TrainingArguments) -> bool:
    """Return whether FSDP shards the run: by its flag, or by the config file of `accelerate launch`."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return world_size() > 1 and (bool(training.fsdp) or launched)


def settle_processes(training: TrainingArguments) -> list[str]:
    """Change what one process can't do, and return sentences that say so. Raises InvalidArgument."""
    notes = []
    if world_size() == 1 and training.fsdp:
        training.fsdp = training.fsdp_plugin_args = None
        notes.append(
            "--fsdp: with one process there is nothing to shard, and the run goes on without it; torchrun"
            " --nproc_per_node N -m manylora train … starts several"
        )
    gpus = 0 if training.use_cpu else torch.cuda.device_count()
    if world_size() == 1 and gpus > 1:
        notes.append(
            f"{gpus} GPUs are visible and one process trains on one of them: torchrun --nproc_per_node {gpus} -m"
            " manylora train … uses all, CUDA_VISIBLE_DEVICES chooses one"
        )
    return notes


def check_sharding(training: TrainingArguments, *, searches: bool, init: str) -> None:
    """Refuse what doesn't go with parameters in shards. ``searches``: whether trials look for a learning rate.

    Raises InvalidArgument.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    fsdp = wants_fsdp(training)
    if fsdp and training.deepspeed:
        raise InvalidArgument("--fsdp and --deepspeed both shard the run: give one of them")
    if not (fsdp or is_deepspeed_zero3_enabled()):
        return
    config = training.fsdp_config if isinstance(training.fsdp_config, dict) else {}
    if fsdp and training.activation_checkpointing and config.get("activation_checkpointing"):
        raise InvalidArgument(
            "--gradient_checkpointing and activation_checkpointing of --fsdp_config do the same: leave the flag out"
        )
    if fsdp and training.use_cpu and int(config.get("version", 2)) != 2:
        raise InvalidArgument(
            f"--fsdp_config: version {config['version']} does not shard on a CPU: take version 2, the default"
        )
    if searches:
        raise InvalidArgument(
            "a search for a learning rate runs many trials on one model, which FSDP and ZeRO-3 have sharded by"
            " then: search with DDP or on one GPU, and give the rate that was found"
        )
    if init.startswith(("pissa", "olora")):
        raise InvalidArgument(
            f"--init_lora_weights {init} keeps its start beside the base, which FSDP and ZeRO-3 would shard:"
            " use another, or DDP"
        )


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

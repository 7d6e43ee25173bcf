"""FSDP's shards: made between processes on CPUs too, and gathered for what is saved."""

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import TrainingArguments

from manylora.training.distributed import wants_fsdp


def shard_on_cpu(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Have FSDP2 shard between processes on CPUs, where accelerate 1.15 takes the plugin and then makes DDP of it."""
    state = accelerator.state
    if not wants_fsdp(args) or state.distributed_type is not DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    if state._mixed_precision != "no":
        plugin.set_mixed_precision(state._mixed_precision)
    state.fsdp_plugin = plugin
    # As accelerate does it for GPUs: both states tell the kind of the run.
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained, whole, on the host of the first process; elsewhere nothing. All processes must ask."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    found = get_model_state_dict(model, options=options)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}

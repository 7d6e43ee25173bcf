"""Saving an adapter as an ordinary PEFT adapter for the unchanged base, and loading one back into the run's model."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manylora.adapters.durable import make_ordinary
from manylora.adapters.files import BASE_FILE
from manylora.training.bases.initial import ADAPTER, Residual, lora_layers
from manylora.training.bases.precision import DTYPES
from manylora.training.bases.quantized import QuantizedLinear
from manylora.training.errors import InvalidArgument, TrainingError, reason_of

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CHECKPOINTED = "_checkpoint_wrapped_module."
"""What FSDP's activation checkpointing puts into the names of what it wraps."""
_LISTED = 3


def save_adapter(model: "PeftModel", directory: Path, gathered: Mapping[str, Tensor] | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors. ``gathered`` are a sharded model's trained parameters.

    Factors that started as part of the base (PiSSA, OLoRA) are written with their start, as a plain LoRA of the
    unchanged base. Raises TrainingError rather than save an adapter without tensors.
    """
    whole = {} if gathered is None else {"state_dict": _as_in_model(gathered, model)}
    model.save_pretrained(directory, save_embedding_layers=False, **whole)
    (directory / "README.md").unlink(missing_ok=True)  # peft's card is a form that nobody filled in
    make_plain(model, directory)


def make_plain(model: "PeftModel", directory: Path) -> None:
    """Finish what ``save_pretrained`` wrote: fold in the start of PiSSA and OLoRA; refuse an empty adapter."""
    config = json.loads((directory / CONFIG_FILE).read_text())
    tensors = load_file(directory / WEIGHTS_FILE)
    residuals = _residuals(model)
    if residuals:
        _fold_start(config, tensors, residuals, model)
    plain = {name.replace(CHECKPOINTED, ""): tensor for name, tensor in tensors.items()}
    if residuals or plain.keys() != tensors.keys():
        tensors = plain
        save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    make_ordinary(directory / WEIGHTS_FILE)
    if not tensors or any(tensor.numel() == 0 for tensor in tensors.values()):
        raise TrainingError(
            f"{directory / WEIGHTS_FILE} came out empty: nothing was trained that could be saved"
        )
    if isinstance(config["target_modules"], list):
        # In peft it is a set, whose order is another in each run.
        config["target_modules"] = sorted(config["target_modules"])
    _write_json(directory / CONFIG_FILE, config)
    _write_json(directory / BASE_FILE, describe_base(model, directory))


def _as_in_model(gathered: Mapping[str, Tensor], model: "PeftModel") -> dict[str, Tensor]:
    """Return tensors by the names that the modules have now, by which peft finds its own among them."""
    names = {name.replace(CHECKPOINTED, ""): name for name, _ in model.named_parameters()}
    return {names.get(name, name): tensor for name, tensor in gathered.items()}


def describe_base(model: Any, adapter: Path) -> dict[str, object]:
    """Return how a model's base is held: {kind, double_quant, dtype}. dtype is "bf16", "fp16" or "fp32".

    Of a base that was named by a relative path, which says nothing elsewhere, "directory" says the way to it from
    ``adapter``, the directory that this is written into. The file is published: it tells nothing else of the machine.
    """
    kind, double_quant = "dense", False
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            kind = module.packed_type.format
        elif _has_codes(module):
            kind = "nf4"
    if kind == "nf4":
        section = model.config.quantization_config
        fields = section if isinstance(section, dict) else section.to_dict()
        double_quant = bool(fields.get("bnb_4bit_use_double_quant"))
    dtype = next(name for name, each in DTYPES.items() if each == model.dtype)
    held: dict[str, object] = {"kind": kind, "double_quant": double_quant, "dtype": dtype}
    base = Path(model.config._name_or_path)
    if not base.is_absolute():
        held["directory"] = os.path.relpath(base.resolve(), _published(adapter.resolve()))
    return held


def _published(directory: Path) -> Path:
    """Return where a directory will be that is written beside its place, inside one whose name begins with a dot."""
    for part in (directory, directory.parent):
        if part.name.startswith(".") and part.name.endswith("-partial"):
            return part.parent / directory.relative_to(part)
    return directory


def _has_codes(module: Any) -> bool:
    """Whether a module's weight is NF4 codes. FSDP's shards have left bitsandbytes' state with the module alone."""
    holders = (getattr(module, "weight", None), module)
    return any(getattr(each, "quant_state", None) is not None for each in holders)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def load_adapter(model: "PeftModel", directory: Path) -> None:
    """Load a saved adapter's values into the model that wrote it, or one made alike.

    Raises InvalidArgument unless the file holds exactly this model's tensors.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = directory / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidArgument(
            f"{path} can't be read ({reason_of(error)}); give a checkpoint of this run"
        ) from None
    for name, layer in lora_layers(model):
        if isinstance(layer.base_layer, Residual):
            _take_start(tensors, name, layer.base_layer, float(layer.scaling[ADAPTER]), path)
    expected = {
        name: tensor.shape
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    wrong = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or expected[name] != tensors[name].shape
    )
    if wrong:
        raise InvalidArgument(
            f"{path} doesn't fit this run's adapter: {len(wrong)} tensors differ ({', '.join(wrong[:_LISTED])}); "
            "go on with the rank, targets and base that it was made with"
        )
    set_peft_model_state_dict(model, tensors)


def _residuals(model: "PeftModel") -> dict[str, Residual]:
    return {
        path: layer.base_layer for path, layer in lora_layers(model) if isinstance(layer.base_layer, Residual)
    }


def _factor_names(path: str) -> tuple[str, str]:
    return tuple(f"base_model.model.{path}.lora_{half}.weight" for half in "AB")  # type: ignore[return-value]


def _fold_start(
    config: dict[str, Any], tensors: dict[str, Tensor], residuals: Mapping[str, Residual], model: "PeftModel"
) -> None:
    """Make W − s₀·B₀A₀ + s·BA of each layer W + s·[B, −B₀·s₀/s]·[A; A₀], and the config say rank r + r₀ at scale s."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, layer in lora_layers(model):
        residual, scale = residuals[path], float(layer.scaling[ADAPTER])
        name_a, name_b = _factor_names(path)
        a, b = tensors[name_a], tensors[name_b]
        start_a = residual.start_a.detach().to(a)
        start_b = residual.start_b.detach().to(b) * (-residual.scale / scale)
        tensors[name_a] = torch.cat((a, start_a)).contiguous()
        tensors[name_b] = torch.cat((b, start_b), dim=1).contiguous()
        ranks[path] = tensors[name_a].shape[0]
        alphas[path] = scale * (math.sqrt(ranks[path]) if config["use_rslora"] else ranks[path])
    config["r"], config["rank_pattern"] = _most_and_others(ranks)
    config["lora_alpha"], config["alpha_pattern"] = _most_and_others(alphas)
    config["init_lora_weights"] = True


def _most_and_others(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the commonest value, and the paths that have another."""
    everywhere = list(values.values())
    most = max(dict.fromkeys(everywhere), key=everywhere.count)
    return most, {path: value for path, value in values.items() if value != most}


def _take_start(tensors: dict[str, Tensor], path: str, residual: Residual, scale: float, file: Path) -> None:
    """Split a saved layer into its factors and its start, and put the start back where it was."""
    name_a, name_b = _factor_names(path)
    start = residual.start_a.shape[0]
    if name_a not in tensors or name_b not in tensors:
        return  # refused afterwards, with all others
    if tensors[name_a].shape[0] <= start:
        raise InvalidArgument(
            f"{file} is no adapter of a run with --init_lora_weights pissa or olora, which are saved with their start;"
            " leave the flag out to go on from it"
        )
    own = tensors[name_a].shape[0] - start
    residual.start_a.data.copy_(tensors[name_a][own:])
    residual.start_b.data.copy_(tensors[name_b][:, own:] * (-scale / residual.scale))
    tensors[name_a], tensors[name_b] = tensors[name_a][:own].clone(), tensors[name_b][:, :own].clone()

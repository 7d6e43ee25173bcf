"""References for adapters and 4-bit weights: peft on transformers, and transformers on bitsandbytes."""

import copy
import warnings
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import tests.quant.bnb  # noqa: F401  # quiets its import
from manylora.adapters.types import AdapterWeights


def adapted(model: torch.nn.Module, weights: AdapterWeights, weight: float = 1.0) -> torch.nn.Module:
    """Return a copy of ``model`` with the adapter merged in by peft, times ``weight``."""
    ranks = {path: pair.a.shape[0] for path, pair in weights.pairs.items()}
    rank = next(iter(ranks.values()))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ranks), lora_dropout=0.0)
    with warnings.catch_warnings():
        # peft asks transformers for an attribute that it has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        peft = get_peft_model(copy.deepcopy(model), config)
    modules = dict(peft.base_model.model.named_modules())
    with torch.no_grad():
        for path, pair in weights.pairs.items():
            modules[path].lora_A["default"].weight.copy_(pair.a)
            modules[path].lora_B["default"].weight.copy_(pair.b.T * weight)
    merged: torch.nn.Module = peft.merge_and_unload() if weight != 1.0 else peft
    return merged.eval()


def nf4_model(directory: Path, *, double_quant: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model of ``dtype`` in NF4 that computes in float32."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=quantization, dtype=dtype, attn_implementation="eager"
    )
    return _dequantising(model)


def saved_nf4_model(directory: Path) -> PreTrainedModel:
    """Return a model that was saved in NF4; what isn't quantised is made float32, so that it computes in it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return _dequantising(model)


def _dequantising(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # Else bitsandbytes repacks for its bfloat16 kernel at the first call, whatever the compute dtype.
            module.support_avx512bf16_for_cpu = False
    return model.eval()

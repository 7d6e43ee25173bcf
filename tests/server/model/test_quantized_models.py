"""Whole models in GPTQ, AWQ and prequantised NF4 against transformers with the dequantised weights."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.quant.errors import QuantError
from manylora.server.model.errors import UnsupportedModel, WeightsMismatch
from tests.quant.packers import awq_tensors, gptq_tensors, nearest_codes
from tests.server.model.models import save_model
from tests.server.model.peft_models import nf4_model, saved_nf4_model
from tests.server.model.quantized_models import save_quantized
from tests.server.model.steps import Stream, all_logits, load, step

TOLERANCE = 1e-4
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def gptq(bits: int, group_size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **more}


def largest_difference(directory: Path, theirs: torch.nn.Module) -> float:
    stream = Stream(0, list(range(3, 73)))
    step(load(directory, quantization="auto"), [(stream, 70)])
    with torch.no_grad():
        expected = theirs(torch.tensor([stream.tokens])).logits[0]
    return float((all_logits(stream) - expected).abs().max())


@pytest.mark.parametrize(
    ("family", "section", "offset"),
    [
        ("llama3", gptq(4, 32), 1),
        ("qwen2", gptq(8, 128, desc_act=True), 1),
        ("mistral", gptq(4, 64, desc_act=True, sym=False, checkpoint_format="gptq_v2"), 0),
        ("qwen3", gptq(4, -1), 1),
    ],
)
def test_gptq(family: str, section: dict[str, Any], offset: int, tmp_path: Path) -> None:
    quantize = partial(
        nearest_codes,
        bits=section["bits"],
        group_size=section["group_size"],
        desc_act=section.get("desc_act", False),
    )
    theirs = save_quantized(family, tmp_path, section, quantize, partial(gptq_tensors, zero_offset=offset))
    assert largest_difference(tmp_path, theirs) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama2", "qwen2"])
def test_awq(family: str, tmp_path: Path) -> None:
    quantize = partial(nearest_codes, bits=4, group_size=32)
    theirs = save_quantized(family, tmp_path, AWQ, quantize, awq_tensors)
    assert largest_difference(tmp_path, theirs) <= TOLERANCE


def test_layers_left_alone_and_a_quantised_head(tmp_path: Path) -> None:
    """Both in one: down_proj stays in 32 bits, the head is packed; AWQ says the former, GPTQ's lm_head the latter."""
    quantize = partial(nearest_codes, bits=4, group_size=32)
    section = gptq(4, 32, lm_head=True, dynamic={"-:.*down_proj": {}})
    theirs = save_quantized(
        "llama2",
        tmp_path,
        section,
        quantize,
        partial(gptq_tensors, zero_offset=1),
        left_alone=("down_proj", "layers.1.self_attn.k_proj"),
        head=True,
    )
    assert largest_difference(tmp_path, theirs) <= TOLERANCE


def test_a_section_beside_config_json(tmp_path: Path) -> None:
    quantize = partial(nearest_codes, bits=4, group_size=32)
    theirs = save_quantized("llama2", tmp_path, AWQ, quantize, awq_tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantError, match="no quantization_config"):
        load(tmp_path, quantization="auto")
    (tmp_path / "quant_config.json").write_text(
        json.dumps({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"})
    )
    assert largest_difference(tmp_path, theirs) <= TOLERANCE


def test_a_bias_that_gptq_wrote_for_nothing_must_be_zero(tmp_path: Path) -> None:
    """AutoGPTQ gives every layer a bias."""

    def save(bias: float) -> torch.nn.Module:
        quantize = partial(nearest_codes, bits=4, group_size=32)
        return save_quantized(
            "llama2",
            tmp_path,
            gptq(4, 32),
            quantize,
            lambda codes: gptq_tensors(codes, 1) | {"bias": torch.full((codes.codes.shape[1],), bias)},
        )

    theirs = save(0.0)
    assert largest_difference(tmp_path, theirs) <= TOLERANCE
    save(0.5)
    with pytest.raises(WeightsMismatch, match=r"q_proj\.bias is not zero"):
        load(tmp_path, quantization="auto")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_what_is_quantised_stays_so(quantization: Any, tmp_path: Path) -> None:
    save_quantized("llama2", tmp_path, AWQ, partial(nearest_codes, bits=4, group_size=32), awq_tensors)
    with pytest.raises(UnsupportedModel, match="awq"):
        load(tmp_path, quantization=quantization)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prequantised_nf4_of_each_type(dtype: torch.dtype, double_quant: bool, tmp_path: Path) -> None:
    """Quantised by bitsandbytes from weights of a type, saved by transformers, served in float32."""
    save_model("qwen2", tmp_path / "base", dtype)
    quantised = nf4_model(tmp_path / "base", double_quant=double_quant, dtype=dtype)
    quantised.save_pretrained(tmp_path / "quantised")
    theirs = saved_nf4_model(tmp_path / "quantised")
    assert largest_difference(tmp_path / "quantised", theirs) <= TOLERANCE

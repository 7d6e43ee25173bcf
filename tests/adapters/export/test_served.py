"""What is merged is what we serve: our decoder with the adapter beside its 4-bit base, and our loader on the result."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.export import export
from manylora.adapters.reader import read_adapter
from manylora.adapters.types import ModuleShape
from manylora.server.model.loader import Quantization
from tests.adapters.export.making import FAMILIES, MIXED, load, make_adapter, make_base, settings
from tests.quant.packers import awq_tensors, gptq_tensors, nearest_codes
from tests.server.model.quantized_models import save_quantized
from tests.server.model.steps import Stream, all_logits, place, step
from tests.server.model.steps import load as load_ours

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
TOKENS = [5, 17, 300, 42, 99, 7, 230, 12, 9, 31, 250, 3]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def ours(
    directory: Path,
    adapter: Path | None = None,
    quantization: Quantization = "auto",
    tokens: list[int] = TOKENS,
) -> torch.Tensor:
    """What the server computes, float32."""
    model = load_ours(directory, quantization=quantization)
    stream = Stream(0, tokens)
    if adapter is not None:
        shapes = model.decoder.config.base_modules()
        modules = {path: ModuleShape(*shape) for path, shape in shapes.items()}
        weights = read_adapter(adapter, modules, max_rank=64, dtype=torch.float32).weights
        stream = Stream(0, tokens, ((place(model, [weights])[0], 1.0),))
    step(model, [(stream, len(tokens))])
    return all_logits(stream)


def theirs(directory: Path, tokens: list[int] = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load(directory)(torch.tensor([tokens])).logits[0]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_into_the_dequantised_base_is_what_is_served(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    make_adapter(tmp_path / "adapter", base, use_rslora=True, **MIXED)
    out = tmp_path / "out"
    report = export(settings(base, tmp_path / "adapter", out, into="dequantized", dtype="float32"))
    # Quantised from bfloat16, as a server of that dtype does; read in float32, which has the same codes.
    served = ours(base, tmp_path / "adapter", "nf4")
    torch.testing.assert_close(theirs(out), served, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours(out, quantization="none"), served, rtol=1e-3, atol=1e-3)
    assert report.manifest["logits"]["relative"] < 1e-5  # type: ignore[index]  # JSON


def test_merged_4bit_is_served_as_transformers_sees_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2-untied")
    make_adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    export(settings(base, tmp_path / "adapter", out, format="merged-4bit", double_quant=True))
    export(settings(base, tmp_path / "adapter", tmp_path / "dense", dtype="bfloat16"))
    # Quantising the merged checkpoint at load gives the same codes as the prequantised one has.
    codes = load_ours(tmp_path / "dense", quantization="nf4", double_quant=True)
    stream = Stream(0, TOKENS)
    step(codes, [(stream, len(TOKENS))])
    torch.testing.assert_close(ours(out), all_logits(stream), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_gptq_or_awq_base_is_merged_dequantised(tmp_path: Path, kind: str) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    quantize = partial(nearest_codes, bits=4, group_size=32)
    if kind == "gptq":
        model = save_quantized("qwen2", base, GPTQ, quantize, partial(gptq_tensors, zero_offset=1))
    else:
        model = save_quantized("qwen2", base, AWQ, quantize, awq_tensors)
    adapted = make_adapter(tmp_path / "adapter", base, model=model)
    report = export(settings(base, tmp_path / "adapter", out, dtype="float32"))
    tokens = [5, 17, 30, 42, 9, 7, 23, 12]
    with torch.no_grad():
        expected = adapted(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(theirs(out, tokens), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours(out, quantization="none", tokens=tokens), expected, rtol=1e-3, atol=1e-3)
    assert report.manifest["into"] == "dequantized"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_16_bit_weights_of_a_quantised_base_are_used_when_they_are_given(tmp_path: Path) -> None:
    dense = make_base(tmp_path / "dense")
    make_adapter(tmp_path / "adapter", dense)
    four_bit = tmp_path / "four_bit"
    _save_nf4(dense, four_bit)
    with pytest.raises(ExportRefused, match="no 16-bit weights"):
        export(settings(four_bit, tmp_path / "adapter", tmp_path / "out", into="16bit"))
    report = export(settings(four_bit, tmp_path / "adapter", tmp_path / "out", base_16bit=dense))
    assert report.manifest["into"] == "16bit"
    distance: Any = report.manifest["served"]
    assert distance["nearer"] == "dequantized"
    assert distance["distance"]["dequantized"]["relative"] < distance["distance"]["16bit"]["relative"]
    direct = export(settings(dense, tmp_path / "adapter", tmp_path / "direct"))
    assert direct.manifest["logits"] == report.manifest["logits"]
    other = make_base(tmp_path / "other", "llama")
    with pytest.raises(ExportRefused, match="another model"):
        export(settings(four_bit, tmp_path / "adapter", tmp_path / "never", base_16bit=other))


def _save_nf4(base: Path, directory: Path) -> None:
    """Save a base in NF4 by transformers + bitsandbytes."""
    from transformers import BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load(base, quantization_config=four_bit).save_pretrained(directory)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, directory)

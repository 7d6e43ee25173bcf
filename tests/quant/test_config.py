"""Which format a checkpoint is in, by its config: what is served is told apart, what isn't is refused by name."""

import json
from pathlib import Path

import pytest

from manylora.quant.config import stored_format
from manylora.quant.errors import CorruptCheckpoint, UnsupportedQuantization
from manylora.quant.format import StoredFormat

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, StoredFormat("dense")),
        (NF4, StoredFormat("nf4", 4)),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, StoredFormat("nf4", 4)),
        ({**NF4, "load_in_4bit": False, "_load_in_4bit": True}, StoredFormat("nf4", 4)),
        (
            {**NF4, "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]},
            StoredFormat("nf4", 4, double_quant=True),
        ),
        (GPTQ, StoredFormat("gptq", 4, 128, 1)),
        ({**GPTQ, "bits": 8, "sym": False}, StoredFormat("gptq", 8, 128, 1)),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, StoredFormat("gptq", 4, 128, 0)),
        ({**GPTQ, "format": "gptq_v2"}, StoredFormat("gptq", 4, 128, 0)),
        ({**GPTQ, "checkpoint_format": "GPTQ_v2"}, StoredFormat("gptq", 4, 128, 0)),
        ({**AWQ, "version": "Gemm"}, StoredFormat("awq", 4, 128)),
        ({**GPTQ, "group_size": -1, "desc_act": True}, StoredFormat("gptq", 4, -1, 1, reordered=True)),
        ({**GPTQ, "dynamic": {"-:.*down_proj": {}}, "lm_head": True}, StoredFormat("gptq", 4, 128, 1)),
        (AWQ, StoredFormat("awq", 4, 128)),
        ({**AWQ, "version": "GEMM", "modules_to_not_convert": ["o_proj"]}, StoredFormat("awq", 4, 128)),
        ({**AWQ, "group_size": -1, "backend": "auto", "format": "gemm"}, StoredFormat("awq", 4, -1)),
    ],
)
def test_served_formats(section: object, expected: StoredFormat, tmp_path: Path) -> None:
    assert stored_format(tmp_path, {"quantization_config": section}) == expected


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({**GPTQ, "bits": 2}, "GPTQ with 2 bits"),
        ({**GPTQ, "bits": 3}, "GPTQ with 3 bits"),
        ({**GPTQ, "bits": None}, "GPTQ with None bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin'"),
        ({**GPTQ, "is_marlin_format": True}, "'marlin'"),
        ({**GPTQ, "checkpoint_format": "bitblas"}, "'bitblas'"),
        ({**GPTQ, "dynamic": {"-:.*a": {}, "+:.*down_proj": {"bits": 8}}}, "down_proj"),
        ({**GPTQ, "dynamic": {r".*\.18\..*": {"bits": 8}}}, "18"),
        ({**GPTQ, "group_size": 0}, "group_size 0"),
        ({**GPTQ, "group_size": -2}, "group_size -2"),
        ({**GPTQ, "group_size": None}, "group_size None"),
        ({**AWQ, "bits": 8}, "AWQ with 8 bits"),
        ({**AWQ, "version": "gemv"}, "'gemv'"),
        ({**AWQ, "version": "gemv_fast"}, "'gemv_fast'"),
        ({**AWQ, "version": "marlin"}, "'marlin'"),
        ({**AWQ, "version": "llm-awq"}, "'llm-awq'"),
        ({**AWQ, "backend": "llm-awq"}, "'llm-awq'"),
        ({**AWQ, "zero_point": False}, "zero_point false"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),
        ({"quant_method": "bitsandbytes"}, "without load_in_4bit"),
        ({"bits": 4}, "no quant_method"),
        *(
            ({"quant_method": method}, f"'{method}'")
            for method in (
                "fp8",
                "fbgemm_fp8",
                "hqq",
                "compressed-tensors",
                "mxfp4",
                "nvfp4",
                "aqlm",
                "quanto",
                "torchao",
                "auto-round",
                "bitnet",
                "eetq",
                "gptq_marlin",
            )
        ),
    ],
)
def test_what_is_not_served_is_named(section: dict[str, object], named: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedQuantization) as refused:
        stored_format(tmp_path, {"quantization_config": section})
    assert named in str(refused.value)
    assert "served" in str(refused.value) or "group_size" in named


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({**GPTQ, "bits": "4"}, "bits is '4', which is no whole number: write it as 4, without quotes"),
        ({**GPTQ, "bits": True}, "bits is True, which is no whole number"),
        ({**GPTQ, "bits": 4.5}, "bits is 4.5"),
        ({**GPTQ, "group_size": "128"}, "group_size is '128', which is no whole number: write it as 128"),
        ({**GPTQ, "group_size": "all"}, "group_size is 'all', which is no whole number"),
        ({**AWQ, "bits": "4"}, "bits is '4'"),
        ({"quant_method": "awq", "w_bit": "4"}, "w_bit is '4'"),
        ({"quant_method": "awq", "bits": 4, "q_group_size": "64"}, "q_group_size is '64'"),
        ({**GPTQ, "desc_act": "false"}, "desc_act is 'false', which is neither true nor false"),
        ({**GPTQ, "is_marlin_format": "no"}, "is_marlin_format is 'no'"),
        ({**AWQ, "zero_point": "false"}, "zero_point is 'false'"),
        ({**NF4, "load_in_4bit": "true"}, "load_in_4bit is 'true'"),
        ({**NF4, "load_in_8bit": "false"}, "load_in_8bit is 'false'"),
    ],
)
def test_values_of_another_type_are_told_as_what_they_are(
    section: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptCheckpoint) as refused:
        stored_format(tmp_path, {"quantization_config": section})
    assert said in str(refused.value)


def test_null_means_that_a_flag_is_left_out(tmp_path: Path) -> None:
    section = {**AWQ, "zero_point": None}
    assert stored_format(tmp_path, {"quantization_config": section}) == StoredFormat("awq", 4, 128)
    section = {**GPTQ, "desc_act": None, "is_marlin_format": 0}
    assert stored_format(tmp_path, {"quantization_config": section}) == StoredFormat("gptq", 4, 128, 1)


def test_compressed_tensors_by_its_old_key(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedQuantization, match="compressed-tensors"):
        stored_format(tmp_path, {"compression_config": {"format": "pack-quantized"}})


def test_a_section_in_a_file_beside(tmp_path: Path) -> None:
    (tmp_path / "quant_config.json").write_text(
        json.dumps({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"})
    )
    assert stored_format(tmp_path, {}) == StoredFormat("awq", 4, 64)
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "desc_act": True, "sym": True, "damp_percent": 0.01})
    )
    assert stored_format(tmp_path, {}) == StoredFormat("gptq", 4, 32, 1, reordered=True)
    # config.json comes first.
    assert stored_format(tmp_path, {"quantization_config": NF4}) == StoredFormat("nf4", 4)


def test_a_section_beside_may_name_its_own_method(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps({"quant_method": "hqq", "bits": 4}))
    with pytest.raises(UnsupportedQuantization, match="'hqq'"):
        stored_format(tmp_path, {})


def test_a_section_that_is_no_section(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="not an object"):
        stored_format(tmp_path, {"quantization_config": "gptq"})
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"quantize_config\.json"):
        stored_format(tmp_path, {})

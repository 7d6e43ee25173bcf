"""The plan's sums: against Qwen's table, against counted parameters, and between settings."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from manylora.loadtest.checks.qwen_memory import GB, LENGTHS, ROWS, SHAPES, Row
from manylora.training.errors import InvalidArgument
from manylora.training.memory.plan import GIB, PART_NAMES, plan
from manylora.training.memory.run_shape import RunShape, optimizer_bytes
from manylora.training.memory.shape import ModelShape
from tests.training.memory.test_shape import FIRST_QWEN_7B

SEVEN_B = ModelShape.from_config(FIRST_QWEN_7B)
RUN = RunShape(seq=1024, batch=4, accumulation=8, gradient_checkpointing=True)


@pytest.mark.parametrize("unit", [GB, GIB], ids=["GB", "GiB"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model} {row.method}")
def test_qwens_table_within_15_percent(row: Row, unit: float) -> None:
    """In either unit: the README writes G."""
    model = ModelShape.from_config(SHAPES[row.model].config())
    for length, measured in zip(LENGTHS, row.measured, strict=True):
        run = RunShape(
            method="qlora" if row.method == "Q-LoRA" else "lora",
            seq=length,
            accumulation=8,
            gradient_checkpointing=True,
            train_embeddings="emb" in row.method,
        )
        planned = plan(model, run, "qwen").total_gib * GIB / unit
        assert abs(planned / measured - 1) <= 0.15, f"{length}: {planned:.1f} for {measured}"


def test_our_qlora_needs_less_than_qwens_script() -> None:
    """Embedding and head stay in 16 bits, and logits are made where tokens are trained."""
    run = replace(RUN, method="qlora", batch=1)
    assert plan(SEVEN_B, run).total_gib < plan(SEVEN_B, run, "qwen").total_gib


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("recipe", [None, "qwen"])
def test_parts_are_named_and_add_up(method: str, device: str, recipe: str | None) -> None:
    planned = plan(SEVEN_B, replace(RUN, method=method, device=device), recipe)
    assert set(planned.parts) <= set(PART_NAMES)
    assert planned.total_gib == pytest.approx(sum(planned.parts.values()))
    assert 0 < planned.tensors_gib < planned.total_gib


def test_weights_by_format() -> None:
    def weights(config: Mapping[str, object], method: str = "lora", *, double_quant: bool = False) -> float:
        shape = ModelShape.from_config({**FIRST_QWEN_7B, **config})
        run = replace(RUN, method=method, double_quant=double_quant)
        bits = plan(shape, run).parts["weights"] * GIB * 8 / shape.layer_parameters
        return round(bits, 3)

    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    assert weights({}) == 16
    assert weights({}, "qlora") == 4.5
    assert weights({}, "qlora", double_quant=True) == 4.127
    stored = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert weights(stored) == weights(stored, "qlora", double_quant=True) == 4.5
    stored["quantization_config"]["bnb_4bit_use_double_quant"] = True
    assert weights(stored) == 4.127
    assert weights(gptq) == weights(gptq, "qlora") == 4.156
    assert weights({"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": -1}}) == 8


def test_a_trained_share_leaves_out_the_other_tokens_logits() -> None:
    whole, half = (plan(SEVEN_B, replace(RUN, trained_share=share)).parts["logits"] for share in (1.0, 0.5))
    assert half == pytest.approx(whole / 2)


def test_optimisers() -> None:
    assert optimizer_bytes("adamw_torch_fused") == optimizer_bytes("paged_adamw_32bit") == 8
    assert 2 < optimizer_bytes("adamw_8bit") == optimizer_bytes("paged_adamw_8bit") < 2.1
    assert optimizer_bytes("adamw_bnb_8bit") == optimizer_bytes("adamw_8bit")
    assert optimizer_bytes("sgd") == 0
    with pytest.raises(InvalidArgument, match="adamwx"):
        optimizer_bytes("adamwx")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seq": 0}, "--seq"),
        ({"method": "full"}, "lora or qlora"),
        ({"dtype": "int8"}, "bf16"),
        ({"trained_share": 0.0}, "share"),
        ({"device": "tpu"}, "cuda"),
    ],
)
def test_a_run_that_can_not_be_is_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        replace(RUN, **change)  # type: ignore[arg-type]


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="expected qwen"):
        plan(SEVEN_B, RUN, "axolotl")

"""The plan's tensors against counted ones, of real training steps on random models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from manylora.training.loop.loss import token_losses, trained_token_loss
from manylora.training.memory.plan import GIB, evaluation_bytes, plan
from manylora.training.memory.run_shape import DTYPES, RunShape
from manylora.training.memory.shape import ModelShape
from manylora.training.memory.trial import _AsPrepared
from tests.training.memory.tensors import LiveTensors


@dataclass(frozen=True)
class Case:
    family: str = "qwen2"
    hidden: int = 256
    width: int = 704
    layers: int = 2
    kv_heads: int = 4
    vocabulary: int = 1000

    def config(self) -> object:
        return AutoConfig.for_model(
            self.family,
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.kv_heads,
            head_dim=64,
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
        )


def prepared_of(case: Case, run: RunShape) -> _AsPrepared:
    """Return a random model with its adapter as a run has it: under autocast, what is trained in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        case.config(), dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[run.dtype]
    )
    targets = list(
        run.targets or ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    whole = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    lora = get_peft_model(
        model,
        LoraConfig(
            r=run.rank,
            lora_dropout=run.dropout,
            rank_pattern=dict(run.rank_pattern),
            use_dora=run.use_dora,
            target_modules=targets,
            task_type="CAUSAL_LM",
            **(whole if run.train_embeddings else {}),
        ),
    )
    lora.enable_input_require_grads()
    if run.gradient_checkpointing:
        lora.activation_checkpointing_enable({"use_reentrant": False})
    for each in lora.parameters():
        if each.requires_grad:
            each.data = each.data.float()
    return _AsPrepared(lora, lambda: torch.autocast("cpu", torch.bfloat16, enabled=run.dtype == "bf16"))


def counted_peak(case: Case, run: RunShape) -> float:
    """Return the bytes of live tensors at most, over two steps as our loop does them."""
    prepared = prepared_of(case, run).train()
    optimizer = torch.optim.AdamW([each for each in prepared.parameters() if each.requires_grad])
    with LiveTensors([*prepared.parameters(), *prepared.buffers()]) as tensors:
        for _ in range(2):
            for _ in range(run.accumulation):
                total, count = trained_token_loss(prepared, _batch(case, run))
                (total / count).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return float(tensors.peak)


def counted_evaluation(case: Case, run: RunShape) -> float:
    """Return the bytes of tensors that an evaluation batch makes, at most."""
    prepared = prepared_of(case, run).eval()
    with LiveTensors([*prepared.parameters(), *prepared.buffers()]) as tensors, torch.no_grad():
        before = tensors.live
        token_losses(prepared, _batch(case, replace(run, seq=run.eval_seq, batch=run.eval_batch)))
    return float(tensors.peak - before)


def _batch(case: Case, run: RunShape) -> Mapping[str, Tensor]:
    ids = torch.randint(0, case.vocabulary, (run.batch, run.seq))
    mask = torch.ones_like(ids)
    mask[1:, -1:] = 0  # rows of different lengths
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


RUN = RunShape(seq=128, batch=1, accumulation=2, rank=8, device="cpu")
DORA = replace(RUN, use_dora=True, accumulation=1)


@pytest.mark.parametrize(
    ("case", "run"),
    [
        (Case(), RUN),
        (Case(), replace(RUN, gradient_checkpointing=True)),
        (Case(), replace(RUN, rank=64, dropout=0.0)),
        (Case(), replace(RUN, dtype="fp32")),
        (Case(), replace(RUN, dtype="fp32", dropout=0.0)),
        (Case(), replace(RUN, targets=("q_proj", "v_proj"), batch=2)),
        (Case(vocabulary=20000), RUN),
        (Case(vocabulary=20000), replace(RUN, gradient_checkpointing=True, batch=2)),
        (Case(vocabulary=5000), replace(RUN, train_embeddings=True)),
        (Case(kv_heads=1), replace(RUN, batch=2)),
        (Case(family="qwen3", width=1408), RUN),
        (Case(family="llama", hidden=512), replace(RUN, gradient_checkpointing=True)),
        (Case(), replace(RUN, rank_pattern=(("down_proj", 128), (r"layers\.0\..*", 256)))),
        (Case(vocabulary=200, width=2048, layers=1), replace(DORA, seq=8)),
        (Case(vocabulary=200), replace(DORA, seq=512)),
        (Case(vocabulary=200, hidden=512, width=768), replace(DORA, gradient_checkpointing=True)),
        (Case(vocabulary=200), replace(DORA, dropout=0.0)),
        (Case(vocabulary=200), replace(DORA, dtype="fp32")),
        (Case(vocabulary=200), replace(DORA, targets=("q_proj", "v_proj"), batch=2)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
def test_the_plans_tensors_are_those_that_are_alive(case: Case, run: RunShape) -> None:
    shape = ModelShape.from_config(case.config().to_dict())  # type: ignore[attr-defined]
    parts = plan(shape, run)
    planned = (parts.tensors_gib - parts.parts["rollback"]) * GIB  # the loop's, not the step's
    counted = counted_peak(case, run)
    assert planned == pytest.approx(counted, rel=0.1), f"{planned / counted - 1:+.1%}"
    assert set(DTYPES) == {"bf16", "fp16", "fp32"}


EVALUATION = RunShape(seq=64, eval_seq=192, eval_batch=4, rank=8, device="cpu")


@pytest.mark.parametrize(
    ("case", "run"),
    [
        (Case(vocabulary=20000), EVALUATION),
        (Case(vocabulary=20000), replace(EVALUATION, dtype="fp32")),
        (Case(), EVALUATION),
        (Case(), replace(EVALUATION, dtype="fp32")),
        (Case(), replace(EVALUATION, eval_seq=768)),
        (Case(width=2816), replace(EVALUATION, rank=64)),
        (Case(family="llama", hidden=512), EVALUATION),
        (Case(), replace(EVALUATION, use_dora=True)),
        (Case(), replace(EVALUATION, use_dora=True, dtype="fp32")),
        (Case(), replace(EVALUATION, use_dora=True, eval_seq=16)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
def test_an_evaluations_tensors_are_those_that_are_alive(case: Case, run: RunShape) -> None:
    shape = ModelShape.from_config(case.config().to_dict())  # type: ignore[attr-defined]
    counted = counted_evaluation(case, run)
    planned = evaluation_bytes(shape, run)
    assert planned == pytest.approx(counted, rel=0.15), f"{planned / counted - 1:+.1%}"

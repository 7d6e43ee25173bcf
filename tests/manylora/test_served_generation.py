"""Generating with the serving engine inside this process: the same tokens as transformers + peft, and no traces."""

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from manylora.loadtest.material.checkpoints import ALL_LINEAR, AdapterShape, write_adapter
from manylora.quant.nf4 import quantize_nf4
from manylora.served_generation import ServedBase, ServedGeneration
from manylora.training.errors import BaseRefused, InvalidData, TrainingError

DEMO = Path(__file__).resolve().parents[2] / "demo"
BASE, SQL = DEMO / "base", DEMO / "adapters" / "sql"
NEW_TOKENS = 48
Conversation = list[Mapping[str, str]]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    found = [json.loads(line) for line in (DEMO / "heldout.jsonl").read_text().splitlines()]
    return [row for row in found if row["adapter"] == "sql"][:12]


@pytest.fixture(scope="module")
def conversations(rows: list[dict[str, object]]) -> list[Conversation]:
    return [row["messages"] for row in rows]  # type: ignore[misc]


@pytest.fixture(scope="module")
def generate() -> Iterator[ServedGeneration]:
    with ServedGeneration(ServedBase(BASE, dtype="float32")) as served:
        yield served


def reference(conversations: list[Conversation], adapter: Path | None) -> list[str]:
    """What transformers and peft generate greedily on the base's dequantised NF4 weights."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(BASE))
    model = AutoModelForCausalLM.from_pretrained(str(BASE), dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = quantize_nf4(module.weight.data).dequantize(torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    answers = []
    for conversation in conversations:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        made = model.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW_TOKENS)
        answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("adapter", [None, SQL], ids=["base", "adapter"])
def test_answers_are_those_of_transformers_and_peft(
    generate: ServedGeneration, conversations: list[Conversation], adapter: Path | None
) -> None:
    assert generate(conversations, adapter, NEW_TOKENS) == reference(conversations, adapter)


def test_the_adapter_answers_as_it_was_taught_and_is_gone_afterwards(
    generate: ServedGeneration, rows: list[dict[str, object]], conversations: list[Conversation]
) -> None:
    before = generate(conversations, None, NEW_TOKENS)
    taught = generate(conversations, SQL, NEW_TOKENS)
    right = [answer == row["expected"] for answer, row in zip(taught, rows, strict=True)]
    assert sum(right) >= 11
    assert generate(conversations, None, NEW_TOKENS) == before != taught


def test_a_higher_rank_and_longer_conversations_find_room(
    conversations: list[Conversation], tmp_path: Path
) -> None:
    small, large = (
        write_adapter(tmp_path / str(rank), BASE, AdapterShape(rank, targets=ALL_LINEAR)) for rank in (2, 96)
    )
    with ServedGeneration(ServedBase(BASE)) as served:
        first = served(conversations[:2], small, 4)
        served(conversations[:2], large, 4)
        served([[{"role": "user", "content": "and so on " * 60}]], small, 60)
        assert served(conversations[:2], small, 4) == first


def test_nothing_is_left_behind(
    conversations: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    threads, dice = set(threading.enumerate()), torch.random.get_rng_state()
    with ServedGeneration(ServedBase(BASE)) as served:
        served(conversations[:1], SQL, 4)
        assert list((tmp_path / "temporary").iterdir())
    served.close()
    assert not list((tmp_path / "temporary").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert torch.equal(torch.random.get_rng_state(), dice)
    assert {thread for thread in threading.enumerate() if thread.name == "engine"} <= threads


def test_no_conversation_needs_no_base() -> None:
    assert ServedGeneration(ServedBase(Path("nowhere")))([], None, 8) == []


def test_what_cannot_be_generated_is_told_in_one_line(
    generate: ServedGeneration, conversations: list[Conversation], tmp_path: Path
) -> None:
    with pytest.raises(BaseRefused, match="base can't be served"):
        ServedGeneration(ServedBase(tmp_path / "nowhere"))(conversations, None, 8)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_qalora": True}))
    with pytest.raises(TrainingError, match="QALoRA"):
        generate(conversations, tmp_path, 8)
    with pytest.raises(InvalidData, match="fills the base's context"):
        generate([[{"role": "user", "content": "word " * 5000}]], None, 8)

"""The demo's files as they ship: complete, small, of the right formats, and made by the code beside them."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from manylora.demo.examples import chat, document, text_of
from manylora.demo.finetune import BASE_NAME, RECIPES, Recipe
from manylora.demo.forms import FORMS
from manylora.demo.heldout import held_out_prompts, write_prompts
from manylora.demo.tables import draw_table
from manylora.demo.tokenizer import train_tokenizer
from manylora.demo.words import NUMBERS, SCHEMAS

DEMO = Path(__file__).resolve().parents[2] / "demo"
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(DEMO / "base")


def test_the_demo_is_small() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 10 * MEGABYTE


def test_the_base_is_qwen2_in_bfloat16() -> None:
    config = json.loads((DEMO / "base" / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    tensors = load_file(DEMO / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_held_out_file_is_what_the_code_makes(tmp_path: Path) -> None:
    write_prompts(held_out_prompts(), tmp_path / "heldout.jsonl")
    assert (tmp_path / "heldout.jsonl").read_text() == (DEMO / "heldout.jsonl").read_text()


def test_the_tokenizer_is_what_the_code_makes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_every_word_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [str(number) for number in NUMBERS]
    for schema in SCHEMAS:
        words += [*schema.keys, *schema.labels]
    assert [word for word in words if len(tokenizer(word)["input_ids"]) != 1] == []
    # ... and the same one in a sentence, between quotes and in a row
    for form in ("The age of {} is", '{{"name": "{}"}}', "Rome | {}\n"):
        assert [
            w for w in words if tokenizer(w)["input_ids"][0] not in tokenizer(form.format(w))["input_ids"]
        ] == []


def test_the_tokenizer_round_trips(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(5)
    texts = [text_of(chat(rng, form)) for form in FORMS for _ in range(25)]
    texts += [
        text_of(document(rng)),
        str(draw_table(rng)),
        "",
        "  two  spaces\t\r\n",
        "naïve 日本語 🏴‍☠️",
        "3.14 + 100",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_chats_follow_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = held_out_prompts()[0]
    messages = [{"role": "system", "content": "Be brief."}, *prompt.messages]
    opening = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opening == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{prompt.question.prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_ranks_and_targets_differ() -> None:
    assert sorted(recipe.rank for recipe in RECIPES) == [4, 8, 16]
    assert len({recipe.targets for recipe in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.form for recipe in RECIPES])
def test_adapters_are_in_peft_format(recipe: Recipe) -> None:
    folder = DEMO / "adapters" / recipe.form
    files = {"adapter_config.json", "adapter_model.safetensors", "manylora_adapter.json"}
    assert {path.name for path in folder.iterdir()} == files
    text = (folder / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["peft_type"] == "LORA"
    assert config["r"] == recipe.rank
    assert set(config["target_modules"]) == set(recipe.targets)
    assert config["base_model_name_or_path"] == BASE_NAME
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == set(recipe.targets)

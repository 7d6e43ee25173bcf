"""Plain text: every token but the first is trained, and nothing stands around it twice."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from manylora.training.data.dataset import DataSettings, load_data
from manylora.training.data.render import IGNORED
from tests.training.data.families import tokenizer_of

BOS, EOS = "<s>", "</s>"


def adding(template: str) -> Any:
    """A tokenizer that puts tokens around a text, as Llama's and Gemma's do."""
    whole = tokenizer_of("zephyr")
    backend = type(whole.backend_tokenizer).from_str(whole.backend_tokenizer.to_str())
    numbers = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)


def tokens_of(directory: Path, text: str, tokenizer: Any) -> list[str]:
    (directory / "a.txt").write_text(text)
    data = load_data(DataSettings((str(directory / "a.txt"),), 60), tokenizer)
    [item] = data.dataset
    assert item["labels"] == [IGNORED, *item["input_ids"][1:]]
    assert data.report.trained_tokens == len(item["input_ids"]) - 1
    return list(tokenizer.convert_ids_to_tokens(item["input_ids"]))


@pytest.mark.parametrize("template", ["$A", f"{BOS} $A", f"{BOS} $A {EOS}", f"$A {EOS}"])
@pytest.mark.parametrize("text", ["Hello there", f"{BOS}Hello there", f"{BOS}Hello there{EOS}"])
def test_a_text_begins_and_ends_once(tmp_path: Path, template: str, text: str) -> None:
    found = tokens_of(tmp_path, text, adding(template))
    begins = text.startswith(BOS) or template.startswith(BOS)
    assert found.count(BOS) == begins
    assert (found[0] == BOS) == begins
    assert found.count(EOS) == 1
    assert found[-1] == EOS


def test_a_begin_token_further_inside_stays(tmp_path: Path) -> None:
    found = tokens_of(tmp_path, f"Hello {BOS}there", adding(f"{BOS} $A"))
    assert found.count(BOS) == 2


def test_a_text_of_one_token_teaches_nothing_and_is_left_out(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatml")
    (tmp_path / "a.txt").write_text("Hello there\n<|im_end|>\n")
    report = load_data(DataSettings((str(tmp_path / "a.txt"),), 60), tokenizer).report
    assert report.examples == 1
    assert report.dropped.first == [f"{tmp_path / 'a.txt'}:2"]

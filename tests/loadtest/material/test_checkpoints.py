"""Random checkpoints are true ones: transformers, peft and this server's loader read them, and adapters differ."""

import warnings
from itertools import combinations
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from manylora.loadtest.material.checkpoints import (
    ALL_LINEAR,
    TINY,
    AdapterShape,
    BaseShape,
    copy_tokenizer,
    linear_shapes,
    write_adapter,
    write_base,
    write_tokenizer,
)
from manylora.server.kernels.plain import PlainBackend
from manylora.server.model.loader import load_weights

TEXT = "SELECT name FROM people;\n\tdéjà vu, 日本, 🙂 <|im_start|>"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), shard_bytes=400_000)


def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[int, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    return tuple(tokens[0].tolist())


def test_the_weights_are_written_in_shards_that_our_loader_takes_whole(base: Path) -> None:
    assert len(list(base.glob("model-*-of-*.safetensors"))) > 1
    config, _, _ = load_weights(
        base, PlainBackend(torch.device("cpu"), torch.float32), quantization="none", double_quant=False
    )
    assert config.vocab_size == TINY.vocab_size
    assert config.base_modules() == linear_shapes(base)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_each_family_loads_in_transformers(family: str, tmp_path: Path) -> None:
    shape = BaseShape(family, 300, 64, 96, 1, 2, 1, 64, tied=False)
    directory = write_base(tmp_path, shape, dtype=torch.bfloat16)
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype is torch.bfloat16
    assert len(greedy(model, [1, 2, 3])) > 3


def test_the_same_seed_gives_the_same_files_and_another_gives_others(tmp_path: Path) -> None:
    first, again, other = (
        write_base(tmp_path / str(i), seed=seed) / "model.safetensors" for i, seed in enumerate((0, 0, 1))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_greedy_answers_differ_between_adapters_and_from_the_base(base: Path, tmp_path: Path) -> None:
    shapes = [AdapterShape(seed=seed, rank=rank) for seed, rank in enumerate((4, 8, 16, 64))]
    shapes += [AdapterShape(targets=ALL_LINEAR, seed=9), AdapterShape(seed=10, strength=0.2)]
    answers = [greedy(AutoModelForCausalLM.from_pretrained(base), [5, 6, 7])]
    for number, shape in enumerate(shapes):
        directory = write_adapter(tmp_path / str(number), base, shape)
        with warnings.catch_warnings():
            # peft asks transformers for an attribute that it has renamed.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
        answers.append(greedy(model, [5, 6, 7]))
    assert all(one != other for one, other in combinations(answers, 2))


def test_an_unknown_target_is_refused_and_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="q_prof"):
        write_adapter(tmp_path, base, AdapterShape(targets=("q_prof",)))


@pytest.mark.parametrize("size", [259, 320, 20_000, 151_936])
def test_a_tokenizer_of_any_size_gives_every_text_back(size: int, tmp_path: Path) -> None:
    eos = write_tokenizer(tmp_path, size)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size
    assert tokenizer.eos_token_id == eos
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == ids[-1]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_tokenizer_can_be_copied_but_not_into_a_smaller_vocabulary(base: Path, tmp_path: Path) -> None:
    copy = write_base(tmp_path / "copy", BaseShape("llama", 512, 64, 96, 1, 2, 1, 64), tokenizer=base)
    assert AutoTokenizer.from_pretrained(copy).decode([65]) == AutoTokenizer.from_pretrained(base).decode(
        [65]
    )
    with pytest.raises(ValueError, match="320 tokens"):
        copy_tokenizer(base, tmp_path, 300)


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="259"):
        write_tokenizer(tmp_path, 258)

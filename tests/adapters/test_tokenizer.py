"""One way to read a folder's tokenizer: tokenizer.json gives the ids, whatever class the other files name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from manylora import demo
from manylora.adapters.tokenizer import TokenizerRefused, load_tokenizer

TEXTS = (
    "hello world",
    "  two spaces first",
    "<s>after a control token",
    "<s> and a space</s>hello",
    "line\n\n  indented 2048's nai\u0308ve\tcafé",
    " ",
    "",
)
CLASSES = (
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    None,
)
SPECIAL = ["<unk>", "<s>", "</s>"]


def words_in_bytes() -> Backend:
    """Byte-level BPE, split by a pattern that is nobody else's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern="l", behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world", "two spaces first", "and a space"] * 4, trainer)
    return backend


def pieces(*, legacy: bool) -> Backend:
    """What Llama 2's tokenizer.json holds, or what newer ones with SentencePiece's pieces do."""
    words = [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "he",
        "hel",
        "hell",
        "hello",
        "▁hello",
        "w",
        "a",
        "▁a",
        "n",
        "d",
        "an",
        "and",
        "▁and",
    ]
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    vocabulary |= {f"<0x{byte:02X}>": len(SPECIAL) + byte for byte in range(256)}
    vocabulary |= {word: 259 + i for i, word in enumerate(words)}
    merges = [
        ("h", "e"),
        ("he", "l"),
        ("hel", "l"),
        ("hell", "o"),
        ("▁", "hello"),
        ("a", "n"),
        ("an", "d"),
        ("▁", "and"),
    ]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def folder(
    path: Path, backend: Backend, family: str, named: str | None, settings: dict[str, object] | None = None
) -> Path:
    backend.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **(settings or {})}
    if named is not None:
        config["tokenizer_class"] = named
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": family}))
    return path


@pytest.mark.parametrize("named", CLASSES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "qwen3"])
def test_the_file_gives_the_ids_whatever_class_is_named(
    tmp_path: Path, family: str, named: str | None
) -> None:
    backend = words_in_bytes()
    ours = load_tokenizer(folder(tmp_path, backend, family, named))
    assert [ours.encode(text) for text in TEXTS] == [backend.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("legacy_file", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_llama_2_s_own_class_has_no_say_beside_the_file(
    tmp_path: Path, legacy: bool | None, legacy_file: bool, adds_bos: bool
) -> None:
    backend = pieces(legacy=legacy_file)
    settings: dict[str, object] = {"legacy": legacy, "add_bos_token": adds_bos, "add_prefix_space": False}
    ours = load_tokenizer(folder(tmp_path, backend, "llama", "LlamaTokenizer", settings))
    assert [ours.encode(text) for text in TEXTS] == [backend.encode(text).ids for text in TEXTS]
    # What the two kinds of file say: a space before every part of a text, or before the text alone.
    after = backend.encode("<s>hello", add_special_tokens=False).tokens
    assert after == ["<s>", "▁hello" if legacy_file else "hello"]


def test_a_folder_with_sentencepiece_s_file_alone_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b no piece of a model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(TokenizerRefused, match="SentencePiece's own format") as caught:
        load_tokenizer(tmp_path)
    assert "save_pretrained" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}'])
def test_a_broken_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerRefused, match="can't be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_told_which_files_are_missing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(TokenizerRefused, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_is_read_without_a_look_at_all_families() -> None:
    """transformers' AutoTokenizer reads some 1,700 of its own files, which is the better part of a second."""
    base = Path(demo.__file__).parent / "base"
    program = (
        "import sys; from manylora.adapters.tokenizer import load_tokenizer;"
        f" load_tokenizer({str(base)!r}); sys.exit('transformers.models.auto' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

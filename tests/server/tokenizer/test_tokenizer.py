"""Tokenizer: true to the tokenizers library in both directions, templates refused politely."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from manylora.server.engine.detokenizer import Detokenizer
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer import Tokenizer
from tests.adapters.test_tokenizer import folder, pieces

QWEN2 = Path(__file__).parents[4] / "shared" / "tokenizers" / "qwen2"
CORPUS = ["hello world", "the quick brown fox", "naïve café", "日本語のテキスト", "🦙 llama 🦙"] * 4
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def _save(backend: Backend, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    return folder


def _byte_level(folder: Path) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False)])
    return _save(backend, folder)


def _llama_style(folder: Path) -> Path:
    words = ["▁", "▁hello", "▁world", "hello", "a", "b", "é", "▁the"]
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    vocabulary |= {word: 259 + i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    return _save(backend, folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(_byte_level(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(_llama_style(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def qwen2() -> Tokenizer:
    if not QWEN2.is_dir():
        pytest.skip("needs the Qwen2 tokenizer in ../shared/tokenizers/qwen2 beside the repository")
    return Tokenizer(QWEN2)


def _stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> str:
    detokenizer = Detokenizer(tokenizer.vocabulary, prompt or [])
    return "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text())
def test_text_survives_the_round_trip(byte_level: Tokenizer, llama: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, llama):
        ids = tokenizer.encode(text)
        assert _stream(tokenizer, ids) == tokenizer.decode(ids)
    if "<s>" not in text and "</s>" not in text:
        assert _stream(byte_level, byte_level.encode(text)) == text


def _random_ids(tokenizer: Tokenizer, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(tokenizer.vocab_size) for _ in range(dice.randrange(60))]


@pytest.mark.parametrize("seed", range(50))
def test_random_tokens_stream_as_they_decode(byte_level: Tokenizer, seed: int) -> None:
    ids = _random_ids(byte_level, seed)
    assert _stream(byte_level, ids) == byte_level.decode(ids)


@pytest.mark.parametrize("seed", range(200))
def test_random_qwen2_tokens_stream_as_they_decode(qwen2: Tokenizer, seed: int) -> None:
    ids = _random_ids(qwen2, seed)
    assert _stream(qwen2, ids) == qwen2.decode(ids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text())
def test_qwen2_text_survives(qwen2: Tokenizer, text: str) -> None:
    ids = qwen2.encode(text)
    assert _stream(qwen2, ids) == qwen2.decode(ids)


def test_output_that_continues_a_prompt_keeps_its_space(llama: Tokenizer) -> None:
    hello, world = llama.encode("hello")[-1], 261
    assert llama.vocabulary.strips_first_space
    assert _stream(llama, [world], [0]) == "world"
    assert _stream(llama, [world], [0, hello]) == " world"


def test_a_generic_tokenizer_of_a_known_family_is_read_as_its_file_has_it(tmp_path: Path) -> None:
    folder, decomposed = _byte_level(tmp_path), "nai\u0308ve"
    tokens = Tokenizer(folder).encode(decomposed)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert Tokenizer(folder).encode(decomposed) == tokens  # Qwen's own would compose the ï


def test_bytes_and_text_of_single_tokens(byte_level: Tokenizer, llama: Tokenizer) -> None:
    llama_bytes = [llama.vocabulary.raw_bytes(3 + byte) for byte in "🦙".encode()]
    assert b"".join(llama_bytes).decode() == "🦙"
    assert llama.vocabulary.token_text(3 + 0xF0) == "\ufffd"
    assert llama.vocabulary.token_text(0) == "<s>"
    assert llama.vocabulary.token_bytes(0) == b""
    assert byte_level.vocabulary.token_bytes(10**6) == byte_level.vocabulary.raw_bytes(-1) == b""
    ids = byte_level.encode("日本 <tool call>")
    assert b"".join(byte_level.vocabulary.raw_bytes(i) for i in ids) == "日本 <tool call>".encode()


def test_eos_ids_come_from_both_files(byte_level: Tokenizer) -> None:
    assert byte_level.eos_ids == {1, 5}


def test_without_a_generation_config_eos_ids_are_the_models(tmp_path: Path) -> None:
    folder = _byte_level(tmp_path)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 7}))
    assert Tokenizer(str(folder)).eos_ids == {1, 7}


def test_template_gives_ids(byte_level: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert byte_level.render(messages) == "<s>user: hello<s>assistant:"
    assert byte_level.apply_chat_template(messages) == byte_level.encode("<s>user: hello<s>assistant:")
    half = [*messages, {"role": "assistant", "content": "well"}]
    text = byte_level.render(half, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("assistant: well")


def test_a_chat_has_one_bos_even_if_the_tokenizer_adds_it_to_texts(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chatty = Tokenizer(folder(tmp_path, pieces(legacy=True), "llama", None, {"chat_template": template}))
    bos = chatty.encode("")
    assert len(bos) == 1
    chat = chatty.apply_chat_template([{"role": "user", "content": "hello"}])
    assert chat == chatty.encode("hello")
    assert chat.count(bos[0]) == 1


@pytest.mark.parametrize(
    "messages", [[{"role": "system", "content": "x"}], [{"role": "user"}, {"role": "system"}]]
)
def test_what_a_template_refuses_is_the_client_s_fault(
    byte_level: Tokenizer, messages: list[dict[str, str]]
) -> None:
    with pytest.raises(InvalidRequest, match="no system role") as caught:
        byte_level.render(messages)
    assert caught.value.param == "messages"


def test_a_template_reads_what_the_client_says_beside_the_messages(tmp_path: Path) -> None:
    off = "{% if enable_thinking is defined and not enable_thinking %} no thinking{% endif %}"
    template = "{{ messages[0].content }}" + off
    chatty = Tokenizer(folder(tmp_path, pieces(legacy=True), "llama", None, {"chat_template": template}))
    messages = [{"role": "user", "content": "hello"}]
    assert chatty.render(messages) == "hello"
    assert chatty.render(messages, {"enable_thinking": False}) == "hello no thinking"


def test_threads_get_what_one_thread_gets(byte_level: Tokenizer) -> None:
    texts = [f"{line} {i}" for i, line in enumerate(CORPUS * 20)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(byte_level.encode, texts)) == [byte_level.encode(text) for text in texts]

"""Completions with a suffix, on bases whose tokenizers have the tokens of each family."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import openai
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.server.api.asks import PlainPrompts
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.api.middle import with_suffix
from manylora.server.tokenizer.model_text import Codec, ModelText
from manylora.server.tokenizer.vocabulary import Vocabulary
from tests.server.api.running import BASE, Files, Running, running

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
DEEPSEEK = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
STARCODER = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
CODELLAMA = ("▁<PRE>", "▁<SUF>", "▁<MID>")


def write_filling(directory: Path, tokens: Sequence[str], *, bos: bool = False) -> tuple[Files, Tokenizer]:
    """Write a base whose tokenizer has the tokens, none of them special, as Qwen's are; return it too."""
    files = Files(directory)
    write_base(files.base, TINY)
    (files.adapters).mkdir()
    path = files.base / "tokenizer.json"
    # The tiny base has 320 rows; the tokenizer's last ones make room.
    written = json.loads(path.read_text())
    vocabulary = written["model"]["vocab"]
    for name in sorted(vocabulary, key=vocabulary.get)[-len(tokens) - 3 :]:
        del vocabulary[name]
    written["model"]["merges"] = [
        pair
        for pair in written["model"]["merges"]
        if "".join(pair if isinstance(pair, list) else pair.split(" ")) in vocabulary
    ]
    path.write_text(json.dumps(written))
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    if bos:
        ends = "<|endoftext|>"
        tokenizer.post_processor = TemplateProcessing(
            single=f"{ends} $A", special_tokens=[(ends, tokenizer.token_to_id(ends))]
        )
    tokenizer.save(str(path))
    return files, tokenizer


def asked_of(
    server: Running, client: openai.OpenAI, prompt: object, suffix: str, **more: object
) -> tuple[int, ...]:
    """The tokens that the engine is given."""
    seen = []
    engine = server.server.engine
    submit = engine.submit_together

    def watched(requests):  # type: ignore[no-untyped-def]
        seen.extend(requests)
        return submit(requests)

    engine.submit_together = watched  # type: ignore[method-assign]
    try:
        client.completions.create(model=BASE, prompt=prompt, suffix=suffix, max_tokens=2, extra_body=more)  # type: ignore[call-overload]
    finally:
        del engine.submit_together
    [request] = seen
    return tuple(request.prompt_token_ids)


@pytest.mark.parametrize("tokens", [QWEN, STARCODER, DEEPSEEK, CODELLAMA])
def test_the_model_is_asked_by_its_familys_tokens(tokens: tuple[str, str, str], tmp_path: Path) -> None:
    files, tokenizer = write_filling(tmp_path / "files", tokens)
    prefix, suffix, middle = map(tokenizer.token_to_id, tokens)
    before, behind = (tokenizer.encode(text).ids for text in ("def f(x):", " return y"))
    expected = (prefix, *before, suffix, *behind, middle)
    with running(files, tmp_path / "data") as server, server.client() as client:
        assert asked_of(server, client, "def f(x):", " return y") == expected
        assert asked_of(server, client, [before], " return y") == expected
        with pytest.raises(openai.BadRequestError, match="suffix") as refused:
            client.completions.create(model=BASE, prompt="x", suffix="y", echo=True)
        assert refused.value.param == "echo"


def test_what_begins_a_text_begins_the_prompt_and_a_middle_ends_at_any_of_the_tokens(tmp_path: Path) -> None:
    files, tokenizer = write_filling(tmp_path / "files", (*QWEN, "<|file_sep|>"), bos=True)
    bos, ends = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|file_sep|>")
    with running(files, tmp_path / "data") as server, server.client() as client:
        told = asked_of(server, client, "x", "y")
        assert told[0] == bos
        assert told.count(bos) == 1
        assert asked_of(server, client, "x", "y", add_special_tokens=False) == told[1:]
        sure = {str(ends): 100}
        answer = client.completions.create(model=BASE, prompt="x", suffix="y", max_tokens=9, logit_bias=sure)
        assert (answer.choices[0].finish_reason, answer.choices[0].text) == ("stop", "")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 1
        goes_on = client.completions.create(model=BASE, prompt="x", max_tokens=9, logit_bias=sure)
        assert goes_on.choices[0].finish_reason == "length", "it ends middles alone"


def test_without_the_tokens_a_suffix_is_refused_and_an_empty_one_asks_for_nothing(
    client: openai.OpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError, match="no tokens to ask for a middle") as refused:
        client.completions.create(model=BASE, prompt="x", suffix="y")
    assert refused.value.param == "suffix"
    assert client.completions.create(model=BASE, prompt="x", suffix="", max_tokens=1).choices


class Spaced:
    """A codec that puts a space before each text, as SentencePiece does; a token is a character's code."""

    async def encode(
        self, lane: object, texts: Sequence[str], *, add_special_tokens: bool, at_most: int
    ) -> list[list[int]]:
        return [list(f" {text}".encode()) if text else [] for text in texts]


async def test_the_suffix_begins_without_the_space_that_a_tokenizer_puts_before_each_text() -> None:
    names = [bytes([number]) for number in range(256)] + [name.encode() for name in CODELLAMA]
    vocabulary = Vocabulary(
        names, {name: 256 + i for i, name in enumerate(CODELLAMA)}, strips_first_space=True
    )
    text = ModelText(cast(Codec, Spaced()), vocabulary, {}, frozenset())
    deps = SimpleNamespace(
        tokenising=SimpleNamespace(prompts=None), settings=SimpleNamespace(context_length=99)
    )
    asked = PlainPrompts(prompts=["x"], suffix="y", add_special_tokens=False)
    ids, ends = await with_suffix(cast(ApiDependencies, deps), asked, [[32, 120]], text)
    assert ids == [[256, 32, 120, 257, 121, 258]]
    assert ends == {256, 257, 258}

"""Whoever reads a base's tokenizer gets the tokens that the server makes: training, merges, load tests."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from manylora.adapters.export.samples import PROMPTS, built_in_rows
from manylora.loadtest.material.checkpoints import copy_tokenizer
from manylora.loadtest.material.http_client import Target
from manylora.loadtest.material.prompts import calibrate
from manylora.server.tokenizer import Tokenizer
from manylora.training.bases.tokenizer import load_tokenizer
from manylora.training.check import lengths
from tests.adapters.test_tokenizer import TEXTS, folder, pieces, words_in_bytes


@pytest.fixture(params=["bytes", "pieces"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that AutoTokenizer would read otherwise than its tokenizer.json has it."""
    if request.param == "bytes":
        return folder(tmp_path, words_in_bytes(), "qwen2", "LlamaTokenizerFast")
    return folder(tmp_path, pieces(legacy=True), "llama", "LlamaTokenizer", {"legacy": False})


def test_training_and_checks_of_data(base: Path) -> None:
    served, trained = Tokenizer(base), load_tokenizer(base)
    assert [trained.encode(text) for text in TEXTS] == [served.encode(text) for text in TEXTS]
    counts = lengths.token_counts(TEXTS, lengths.load_tokenizer(base)).tolist()
    assert counts == [len(served.encode(text, add_special_tokens=False)) for text in TEXTS]


def test_merges(base: Path) -> None:
    served = Tokenizer(base)
    rows = built_in_rows(base, served.vocab_size)
    assert [row.tokens for row in rows] == [tuple(served.encode(prompt)[-24:]) for prompt in PROMPTS]


def test_load_tests(base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    served = Tokenizer(base)

    async def made() -> str:
        async with httpx.AsyncClient() as client:
            return (await calibrate(client, Target("http://nobody", "completions"), "m", 0, base)).of(0, 500)

    # A word more or less is all that the line through two samples may be off by.
    assert abs(len(served.encode(asyncio.run(made()))) - 500) < 60
    copy = tmp_path_factory.mktemp("copy")
    assert copy_tokenizer(base, copy, served.vocab_size) in served.eos_ids


def test_tokens_beyond_a_model_s_vocabulary_are_listed(tmp_path: Path) -> None:
    backend = words_in_bytes()
    served = Tokenizer(folder(tmp_path, backend, "llama", None, {"pad_token": "[PAD]"}))
    size = backend.get_vocab_size()
    assert served.ids_beyond(size) == {"[PAD]": size}
    assert served.ids_beyond(size + 1) == {}
    assert served.encode("a [PAD]")[-1] == size


@pytest.mark.parametrize("far", [5000, 4_000_000_000])
def test_ids_behind_a_hole_in_the_vocabulary_are_known_or_refused(tmp_path: Path, far: int) -> None:
    made = folder(tmp_path, words_in_bytes(), "llama", None)
    path = made / "tokenizer.json"
    written = json.loads(path.read_text())
    written["model"]["vocab"]["zzz"] = far
    path.write_text(json.dumps(written))
    if far == 5000:
        assert Tokenizer(made).ids_beyond(4000) == {"zzz": 5000}
    else:
        with pytest.raises(ValueError, match="token ids go up to 4,000,000,000"):
            Tokenizer(made)

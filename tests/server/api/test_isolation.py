"""Nobody feels an adapter that overflows, nor a token that the model doesn't know: other answers are the same bits."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from manylora.loadtest.material.checkpoints import TINY
from tests.server.api.running import BASE, Files, Running, running

# The longest is computed in chunks that sample nothing.
PROMPTS = ("x", "a" * 40, "the quick brown fox " * 10, "jumps over " * 40)
MODELS = (BASE, "b", "c")
HUGE = ("alpha-a", "alpha-b", "factors-a")
"""Adapters that overflow in what they add, and in their products with anybody's hidden state."""
KV_GIB = 0.003
"""Some 3,000 tokens: blocks are used again and again, by whoever comes next."""


def answer(client: httpx.Client, model: str, prompt: str) -> object:
    """Tokens with the logprobs of each, to the last bit."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": 3,
        "ignore_eos": True,
    }
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice["text"], choice["logprobs"]


def register(client: httpx.Client, *names: str) -> None:
    for name in names:
        assert client.post("/adapters", json={"name": name, "src": name}).status_code == 201


def spoil(client: httpx.Client, name: str, number: int) -> int:
    """Ask an adapter that overflows; return the status."""
    prompt = f"{number} " + PROMPTS[number % len(PROMPTS)]
    return client.post("/v1/completions", json={"model": name, "prompt": prompt, "max_tokens": 8}).status_code


@pytest.fixture
def with_huge(files: Files, tmp_path: Path) -> Files:
    """The same files, and adapters whose factors are finite and whose products are not."""
    copied = Files(tmp_path / "files")
    shutil.copytree(files.root, copied.root)
    for name in HUGE:
        directory = copied.adapters / name
        shutil.copytree(copied.adapters / name[-1], directory)
        if name.startswith("alpha"):
            config = json.loads((directory / "adapter_config.json").read_text())
            (directory / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e30}))
        else:
            file = directory / "adapter_model.safetensors"
            tensors = {
                name: each * 1e38 if "lora_A" in name else each for name, each in load_file(file).items()
            }
            save_file(tensors, file, metadata={"format": "pt"})
    return copied


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_overflows_is_felt_by_nobody(with_huge: Files, dtype: str, tmp_path: Path) -> None:
    """Beside it and once it is deleted; prompts come in chunks, prefixes from the cache, blocks are used again."""
    limits = {"dtype": dtype, "kv_cache_gib": KV_GIB, "max_step_tokens": 64}
    cases = [(model, prompt) for prompt in PROMPTS for model in MODELS]
    with running(with_huge, tmp_path / "data", **limits) as server, _client(server) as client:
        register(client, "b", "c")
        alone = {case: answer(client, *case) for case in cases}
        register(client, *HUGE)
        with ThreadPoolExecutor(6) as pool:
            bad, good = [], []
            for number, case in enumerate(cases * 3):
                good.append((case, pool.submit(answer, client, *case)))
                bad.append(pool.submit(spoil, client, HUGE[number % 3], number))
            assert all(asked.result() == alone[case] for case, asked in good)
            statuses = {asked.result() for asked in bad}
        assert 500 in statuses
        assert statuses <= {200, 500}
        # The last one to write into the blocks that come next.
        assert spoil(client, HUGE[0], 3) == 500
        assert client.get("/ready").status_code == 200
        for name in HUGE:
            assert client.delete(f"/adapters/{name}").status_code == 200
        assert {case: answer(client, *case) for case in cases} == alone
        # What its prompts left is nobody's either.
        for number in range(24):
            assert spoil(client, BASE, number) == 200
        assert client.get("/ready").status_code == 200
        server.wait_until_idle()
        server.check_integrity()


def test_a_token_beyond_the_vocabulary_is_refused_and_ends_nobodys_answer(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizer was given [PAD], the model was never resized."""
    copied = Files(tmp_path / "files")
    shutil.copytree(files.root, copied.root)
    file = copied.base / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([f"<extra{n}>" for n in range(tokenizer.get_vocab_size(), TINY.vocab_size)])
    tokenizer.add_special_tokens(["[PAD]"])
    assert tokenizer.token_to_id("[PAD]") == TINY.vocab_size
    tokenizer.save(str(file))
    (copied.adapters / "templated" / "chat_template.jinja").write_text("{{ messages[0].content }} [PAD]")
    with running(copied, tmp_path / "data") as server, _client(server) as client:
        told = [
            record.getMessage() for record in caplog.records if "the tokenizer knows" in record.getMessage()
        ]
        assert len(told) == 1
        assert "'[PAD]'" in told[0]
        register(client, "a", "templated")
        alone = answer(client, "a", PROMPTS[0])
        with ThreadPoolExecutor(4) as pool:
            good = [pool.submit(answer, client, "a", PROMPTS[0]) for _ in range(12)]
            for _ in range(4):
                chat = {"model": "templated", "messages": [{"role": "user", "content": "hello"}]}
                refused = [
                    client.post("/v1/completions", json={"model": BASE, "prompt": "hello [PAD]"}),
                    client.post(
                        "/v1/completions", json={"model": "a", "prompt": ["x", "[PAD]"], "echo": True}
                    ),
                    client.post("/v1/chat/completions", json=chat),
                    client.post(
                        "/v1/completions", json={"model": "a", "prompt": "x", "stop_token_ids": [320]}
                    ),
                ]
                for response in refused:
                    assert response.status_code == 400
                    assert "320" in response.json()["error"]["message"]
            assert all(asked.result() == alone for asked in good)
        assert client.get("/ready").status_code == 200


def _client(server: Running) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60)

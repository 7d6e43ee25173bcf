"""An adapter's tokenizer is taken whole: prompts, templates, answers and their ends; what can't be taken is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from manylora.loadtest.material.checkpoints import (
    TINY,
    AdapterShape,
    write_adapter,
    write_base,
    write_tokenizer,
)
from manylora.server.catalog import ResolvedModel
from manylora.server.tokenizer import ModelText
from tests.server.api.running import BASE, SECONDS, Files, Running, running

KNOWN = 300
"""Tokens of the base's tokenizer; the model has TINY.vocab_size rows."""
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
ACT, BEGIN, DONE, TOOL = "<|act|>", "<|begin|>", "<|done|>", "<tool>"


def own_tokenizer(base: Path) -> Any:
    """The base's tokenizer with four more tokens, of which <tool> has a text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(base))
    tokenizer.add_special_tokens({"bos_token": BEGIN, "eos_token": DONE})
    tokenizer.add_tokens([AddedToken(ACT, special=True), AddedToken(TOOL, special=False)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def shorten(adapter: Path, rows: int) -> None:
    """Give an adapter an embedding and head of fewer rows than the base's tokenizer has tokens."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["modules_to_save"] = ["embed_tokens", "lm_head"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(adapter / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"base_model.model.{name}.weight"] = torch.zeros(rows, TINY.hidden_size)
    save_file(weights, adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = Files(tmp_path_factory.mktemp("checkpoints"))
    write_base(files.base, TINY)
    write_tokenizer(files.base, KNOWN)
    write_adapter(files.adapters / "plain", files.base, AdapterShape(rank=4, seed=1))
    for name in (
        "whole",
        "again",
        "same",
        "spaced",
        "named",
        "unknown",
        "repeats",
        "elsewhere",
        "beyond",
        "broken",
        "short",
    ):
        shutil.copytree(files.adapters / "plain", files.adapters / name)
    own_tokenizer(files.base).save_pretrained(files.adapters / "whole")
    own_tokenizer(files.base).save_pretrained(files.adapters / "again")
    same = json.loads((files.base / "tokenizer.json").read_text())
    (files.adapters / "same" / "tokenizer.json").write_text(json.dumps(same, indent=3))
    # As whoever saves the base's tokenizer with an adapter has it: the same tokens and names, other bytes.
    base = PreTrainedTokenizerFast.from_pretrained(str(files.base))
    base.save_pretrained(files.adapters / "spaced")
    (files.adapters / "spaced" / "tokenizer.json").write_text(json.dumps(same, indent=2))
    config: dict[str, dict[str, object]] = {
        "named": {"eos_token": {"content": "<|im_start|>"}, "bos_token": "<|endoftext|>", "pad_token": None},
        "unknown": {"eos_token": DONE},
        "repeats": {"added_tokens_decoder": {str(KNOWN - 1): {"content": "<|im_end|>", "special": True}}},
        "elsewhere": {"added_tokens_decoder": {"7": {"content": "<|im_end|>", "special": True}}},
    }
    for name, settings in config.items():
        (files.adapters / name / "tokenizer_config.json").write_text(json.dumps(settings))
    (files.adapters / "named" / "chat_template.jinja").write_text(TEMPLATE)
    beyond = own_tokenizer(files.base)
    beyond.add_tokens([f"<new {i}>" for i in range(TINY.vocab_size - len(beyond) + 2)])
    beyond.save_pretrained(files.adapters / "beyond")
    (files.adapters / "broken" / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    shorten(files.adapters / "short", KNOWN - 1)
    return files


@pytest.fixture(scope="module")
def server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(files, tmp_path_factory.mktemp("data")) as server:
        with httpx.Client(base_url=server.url, timeout=SECONDS) as admin:
            for name in ("plain", "whole", "again", "same", "spaced", "named", "repeats"):
                assert admin.post("/adapters", json={"name": name, "src": name}).status_code == 201
        yield server


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        yield client


def ids(http: httpx.Client, model: str, text: str) -> list[int]:
    found: list[int] = http.post("/tokenize", json={"model": model, "prompt": text}).json()["tokens"]
    return found


def chat_ids(http: httpx.Client, model: str) -> list[int]:
    messages = [{"role": "user", "content": "hello"}]
    found: list[int] = http.post("/tokenize", json={"model": model, "messages": messages}).json()["tokens"]
    return found


def forced(http: httpx.Client, model: str, token: int, **more: object) -> Any:
    """Return the choice of an answer in which one token is made over and over."""
    body = {
        "model": model,
        "prompt": "hello",
        "max_tokens": 3,
        "temperature": 0,
        "logit_bias": {str(token): 100},
    }
    answer = http.post("/v1/completions", json={**body, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_prompts_are_tokenised_as_the_adapter_s_tokenizer_does(http: httpx.Client, files: Files) -> None:
    own = own_tokenizer(files.base)
    text = f"hello{ACT} there {TOOL}x"
    assert ids(http, "whole", text) == own.encode(text)
    assert ids(http, "whole", text) != ids(http, BASE, text)
    assert ids(http, "plain", text) == ids(http, BASE, text)
    tokens = ids(http, "whole", text)
    assert http.post("/detokenize", json={"model": "whole", "tokens": tokens}).json() == {"prompt": text}
    usage = http.post("/v1/completions", json={"model": "whole", "prompt": text, "max_tokens": 1}).json()[
        "usage"
    ]
    assert usage["prompt_tokens"] == len(tokens)


def test_the_adapter_s_template_sees_its_own_special_tokens(http: httpx.Client) -> None:
    [begin], [done] = ids(http, "whole", BEGIN), ids(http, "whole", DONE)
    assert chat_ids(http, "whole") == [begin, *ids(http, "whole", "hello"), done]
    [begin], [done] = ids(http, BASE, "<|endoftext|>"), ids(http, BASE, "<|im_start|>")
    assert chat_ids(http, "named") == [begin, *ids(http, BASE, "hello"), done]


@pytest.mark.parametrize(("model", "end"), [("whole", DONE), ("named", "<|im_start|>")])
def test_the_adapter_s_own_end_token_ends_its_answers(http: httpx.Client, model: str, end: str) -> None:
    [token] = ids(http, model, end)
    choice = forced(http, model, token)
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", None, "")
    assert forced(http, model, token, ignore_eos=True)["finish_reason"] == "length"
    assert forced(http, BASE, token)["finish_reason"] == "length"
    # The base's ends it too.
    [of_base] = ids(http, BASE, "<|im_end|>")
    assert forced(http, model, of_base)["finish_reason"] == "stop"


def test_answers_are_written_with_the_adapter_s_tokens(http: httpx.Client) -> None:
    [tool] = ids(http, "whole", TOOL)
    assert forced(http, "whole", tool)["text"] == TOOL * 3
    assert forced(http, "whole", tool, logprobs=0)["logprobs"]["tokens"] == [TOOL] * 3
    assert forced(http, "whole", tool, stop=TOOL)["stop_reason"] == TOOL
    [act] = ids(http, "whole", ACT)
    assert forced(http, "whole", act, stop=ACT)["stop_reason"] == ACT
    echo = http.post(
        "/v1/completions", json={"model": "whole", "prompt": [tool, act], "echo": True, "max_tokens": 0}
    )
    assert echo.json()["choices"][0]["text"] == TOOL + ACT


def text_of(server: Running, model: str) -> ModelText:
    deps = server.server.deps
    resolved: ResolvedModel = server.on_loop(lambda: deps.catalog.resolve(model))
    found = server.start(deps.texts.of(resolved.text, resolved.digest)).result(SECONDS)
    assert isinstance(found, ModelText)
    return found


def test_a_tokenizer_that_equals_the_base_s_is_the_base_s(server: Running, http: httpx.Client) -> None:
    base = server.server.deps.texts.base
    for model in ("plain", "same", "repeats", "named"):
        assert text_of(server, model).codec is base.codec
    assert text_of(server, "whole").codec is not base.codec
    assert ids(http, "same", f"hello{ACT}") == ids(http, BASE, f"hello{ACT}")


def test_a_mixture_is_tokenised_as_all_its_parts_are(server: Running, http: httpx.Client) -> None:
    text = f"hello{ACT} there {TOOL}x"
    assert ids(http, "whole:0.5+again:0.5", text) == ids(http, "whole", text) != ids(http, BASE, text)
    assert chat_ids(http, "again+whole:-1") == chat_ids(http, "whole")
    [done] = ids(http, "whole", DONE)
    assert forced(http, "whole+again", done)["finish_reason"] == "stop"
    assert ids(http, "plain+spaced", text) == ids(http, BASE, text)
    assert chat_ids(http, "plain+spaced") == chat_ids(http, BASE)
    assert ids(http, "plain:0.5+repeats", text) == ids(http, BASE, text)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("plain+whole", ["'plain' and 'whole'", "different chat templates"]),
        ("whole+named:0.1", ["'named' and 'whole'", "different tokenizers"]),
        ("same+plain", ["'same' and 'plain'", "eos_token is None and '<|im_end|>'"]),
    ],
)
def test_parts_that_are_tokenised_differently_are_refused(
    http: httpx.Client, model: str, words: list[str]
) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "hello", "max_tokens": 1}),
        ("/tokenize", {"prompt": "hello"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        refused = http.post(path, json={"model": model, **body})
        assert refused.status_code == 400, refused.text
        assert all(word in refused.json()["error"]["message"] for word in words), refused.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown", [DONE, "eos_token", "tokenizer.json"]),
        ("elsewhere", ["<|im_end|>", "id 7"]),
        ("beyond", ["the adapter's tokenizer", "<new ", str(TINY.vocab_size), "no row"]),
        ("short", ["the base's tokenizer has 1 tokens", f"below {KNOWN - 1}", "the smaller tokenizer"]),
        ("broken", ["tokenizer.json", "can't be loaded"]),
    ],
)
def test_what_cannot_be_taken_whole_is_refused_by_name(
    http: httpx.Client, name: str, words: list[str]
) -> None:
    refused = http.post("/adapters", json={"name": name, "src": name})
    assert refused.status_code == 400
    for word in words:
        assert word in refused.json()["error"]["message"]
    assert "staging" not in refused.text, "a client need not know where the server keeps files"
    assert http.get(f"/adapters/{name}").status_code == 404


def test_the_tokenizer_is_there_again_after_a_restart(files: Files, tmp_path: Path) -> None:
    counts = []
    for start in range(2):
        with running(files, tmp_path) as server, httpx.Client(base_url=server.url, timeout=SECONDS) as http:
            if start == 0:
                assert http.post("/adapters", json={"name": "whole", "src": "whole"}).status_code == 201
            counts.append(ids(http, "whole", f"hello{ACT}{TOOL}"))
            [done] = ids(http, "whole", DONE)
            assert forced(http, "whole", done)["finish_reason"] == "stop"
    assert counts[0] == counts[1]


def test_a_tokenizer_outlives_the_first_adapter_that_brought_it(http: httpx.Client, files: Files) -> None:
    for name, seed in (("first", 11), ("second", 12)):
        write_adapter(files.adapters / name, files.base, AdapterShape(rank=4, seed=seed))
        own_tokenizer(files.base).save_pretrained(files.adapters / name)
        assert http.post("/adapters", json={"name": name, "src": name}).status_code == 201
    expected = ids(http, "first", ACT)
    assert http.delete("/adapters/first").status_code == 200
    assert ids(http, "second", ACT) == expected
    assert len(expected) == 1
    assert http.delete("/adapters/second").status_code == 200


@pytest.mark.parametrize(
    ("model", "ends"), [("whole", DONE), ("named", "<|im_start|>"), ("plain", "<|im_end|>")]
)
def test_answers_are_held_in_the_adapter_s_own_tokens_and_ended_by_its_own(
    server: Running, model: str, ends: str
) -> None:
    """With a token whose text no other tokenizer has; the end that every adapter likes best acts where it may."""
    control = {"whole": KNOWN + 1, "named": None, "plain": None}[model]
    with httpx.Client(base_url=server.url, timeout=SECONDS) as http:
        named = http.post(
            "/tokenize", json={"model": model, "prompt": ends, "add_special_tokens": False}
        ).json()
        [end] = named["tokens"]
        assert control in (None, end)
        body = {"model": model, "prompt": "x", "max_tokens": 30, "seed": 1, "logit_bias": {str(end): 100.0}}
        held = {"guided_regex": "a{3}(<tool>|b)c*"}
        choice = http.post("/v1/completions", json={**body, **held}).json()["choices"][0]
        assert choice["text"] in ("aaa<tool>", "aaab")
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_tokenizers_have_grammars_of_their_own(server: Running) -> None:
    """One that is the base's in all but name shares them."""
    grammars = server.server.deps.grammars
    assert grammars is not None
    with httpx.Client(base_url=server.url, timeout=SECONDS) as http:
        compiled = []
        for model in ("plain", "same", "named", "whole", "again", BASE):
            body = {"model": model, "prompt": "x", "max_tokens": 8, "guided_regex": "(yes|no) sir"}
            answer = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
            assert "yes sir".startswith(answer) or "no sir".startswith(answer)
            compiled.append(grammars.compiled)
    assert [after - compiled[0] for after in compiled] == [0, 0, 0, 1, 1, 1]

"""Control tokens that texts spell: found by stop, kept by echo and /detokenize, put once before a chat."""

from collections.abc import Iterator

import httpx
import pytest

from manylora.loadtest.material.checkpoints import TINY, write_base
from tests.adapters.test_tokenizer import folder, pieces
from tests.server.api.running import BASE, SECONDS, Files, running

SPELLED = "<|im_start|>user\nhi there<|im_end|>\n"
START, END = "<|im_start|>", "<|im_end|>"


def ids(http: httpx.Client, text: str, **more: object) -> list[int]:
    answer = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False, **more})
    found: list[int] = answer.json()["tokens"]
    return found


def complete(http: httpx.Client, **more: object) -> httpx.Response:
    return http.post("/v1/completions", json={"model": BASE, "prompt": "hello", "max_tokens": 4, **more})


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("spelled", [START, [START, "never"]])
def test_a_control_token_ends_a_text_by_its_id(http: httpx.Client, route: str, spelled: object) -> None:
    [start] = ids(http, START)
    body = {
        "model": BASE,
        "max_tokens": 4,
        "logit_bias": {str(start): 100},
        "temperature": 0,
        "stop": spelled,
    }
    asked = (
        {"prompt": "hello"} if route == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    )
    answer = http.post(f"/v1/{route}", json={**body, **asked}).json()
    [choice] = answer["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", START)
    assert answer["usage"]["completion_tokens"] == 1


def test_the_end_token_ends_a_text_by_name_even_if_ends_are_ignored(http: httpx.Client) -> None:
    [end] = ids(http, END)
    forced: dict[str, object] = {"logit_bias": {str(end): 100}, "temperature": 0, "ignore_eos": True}
    assert complete(http, **forced).json()["choices"][0]["finish_reason"] == "length"
    [choice] = complete(http, **forced, stop=END).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", END)
    # What must not end yet isn't sampled before it may.
    [later] = complete(http, **{**forced, "stop": END, "min_tokens": 2}).json()["choices"]
    assert later["finish_reason"] in ("stop", "length")
    assert complete(http, **forced, stop=END, min_tokens=2).json()["usage"]["completion_tokens"] > 2


def test_a_stop_that_could_never_be_found_is_refused(http: httpx.Client) -> None:
    refused = complete(http, stop=["fine", f"{END}\n"])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "stop"
    assert END in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_prompt_that_was_sent(http: httpx.Client, stream: bool) -> None:
    for prompt in (SPELLED, ids(http, SPELLED)):
        answer = complete(http, prompt=prompt, echo=True, max_tokens=0, stream=stream)
        assert answer.status_code == 200
        if stream:
            assert SPELLED.replace("\n", "\\n") in answer.text
        else:
            assert answer.json()["choices"][0]["text"] == SPELLED


@pytest.mark.parametrize("limit", [0, 3])
def test_offsets_point_at_the_tokens_of_an_echoed_prompt(http: httpx.Client, limit: int) -> None:
    for prompt in (SPELLED, ids(http, SPELLED)):
        [choice] = complete(http, prompt=prompt, echo=True, logprobs=0, max_tokens=limit).json()["choices"]
        found = choice["logprobs"]
        count = len(ids(http, SPELLED))
        assert len(found["tokens"]) == len(found["text_offset"]) == count + limit
        for token, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[:count]:
            assert choice["text"].startswith(token, offset)
        assert found["text_offset"][count : count + 1] in ([], [len(SPELLED)])


def test_detokenize_spells_control_tokens(http: httpx.Client) -> None:
    answer = http.post("/detokenize", json={"tokens": ids(http, SPELLED)})
    assert answer.json() == {"prompt": SPELLED}


@pytest.fixture(scope="module")
def adding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server whose tokenizer puts <s> before every text, as Llama 2's."""
    root = tmp_path_factory.mktemp("adding")
    files = Files(root)
    write_base(files.base, TINY)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (root / "tokenizer").mkdir()
    folder(root / "tokenizer", pieces(legacy=True), "llama", "LlamaTokenizer", {"chat_template": template})
    (files.base / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (files.base / name).write_bytes((root / "tokenizer" / name).read_bytes())
    files.adapters.mkdir()
    with (
        running(files, root / "data") as server,
        httpx.Client(base_url=server.url, timeout=SECONDS) as client,
    ):
        yield client


def test_a_chat_begins_with_one_bos(adding: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hello"}]
    chat = adding.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = adding.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
    assert chat == text
    assert chat.count(chat[0]) == 1
    asked = {"model": BASE, "messages": messages, "max_tokens": 1}
    answer = adding.post("/v1/chat/completions", json=asked).json()
    assert answer["usage"]["prompt_tokens"] == len(chat)


def test_what_the_tokenizer_adds_is_no_part_of_an_echoed_text(adding: httpx.Client) -> None:
    for text in ("hello and", "</s>hello", "  and"):
        [choice] = complete(adding, prompt=text, echo=True, logprobs=0, max_tokens=1).json()["choices"]
        assert choice["text"].startswith(text)
        offsets = choice["logprobs"]["text_offset"]
        assert offsets[0] == offsets[1] == 0
        assert offsets[-1] == len(text)

"""When there is no room: adapters wait in order and then are told, a full queue says when to come again."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.api.running import BASE, Files, Running, running


@contextmanager
def serving(files: Files, data: Path, **limits: object) -> Iterator[Running]:
    """A server whose arena holds one of the adapters a, c and templated at a time."""
    with running(files, data, arena_rows=16, **limits) as server:
        for name in ("a", "c", "templated"):
            httpx.post(f"{server.url}/adapters", json={"name": name, "src": name}).raise_for_status()
        yield server
        server.wait_until_idle()
        server.check_integrity()


@contextmanager
def under_way(client: openai.OpenAI, model: str) -> Iterator[None]:
    """A long stream that has begun, until the block ends."""
    with client.completions.create(
        model=model, prompt="x", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(stream)
        yield


def test_an_adapter_that_finds_no_room_gets_503_and_when_to_come_again(files: Files, tmp_path: Path) -> None:
    with serving(files, tmp_path, adapter_timeout=0.2) as server, server.client() as client:
        with under_way(client, "a"), pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model="c", prompt="x", max_tokens=1)
        assert raised.value.status_code == 503
        assert raised.value.code == "adapter_unavailable"
        assert int(raised.value.response.headers["retry-after"]) >= 1
        # The base and the resident adapter never noticed.
        with under_way(client, "a"):
            for model in (BASE, "a"):
                assert client.completions.create(model=model, prompt="x", max_tokens=1).choices
        assert client.completions.create(model="c", prompt="x", max_tokens=1).choices


def test_adapters_that_find_no_room_wait_in_order(files: Files, tmp_path: Path) -> None:
    ended: list[str] = []

    def ask(client: openai.OpenAI, model: str, tokens: int) -> None:
        client.completions.create(model=model, prompt="x", max_tokens=tokens, extra_body={"ignore_eos": True})
        ended.append(model)

    with serving(files, tmp_path) as server, server.client() as client, ThreadPoolExecutor(2) as pool:
        with under_way(client, "a"):
            # The later one is the shorter: it ends first only if it begins first. It isn't so short that both answers
            # are on their way at once.
            for place, (model, tokens) in enumerate((("c", 120), ("templated", 60)), start=1):
                pool.submit(ask, client, model, tokens)
                server.wait_until(
                    f"{place} waiting",
                    lambda place=place: server.server.engine.snapshot().waiting == place,  # type: ignore[misc]
                )
            info = httpx.get(f"{server.url}/metrics").text
            assert 'running_lora_adapters="a",waiting_lora_adapters="c,templated"' in info
        pool.shutdown(wait=True)
        assert ended == ["c", "templated"]


def test_a_full_queue_is_429_and_says_when_to_come_again(files: Files, tmp_path: Path) -> None:
    with (
        serving(files, tmp_path, max_running=1, max_waiting=2) as server,
        server.client() as client,
        ThreadPoolExecutor(2) as pool,
    ):
        with under_way(client, BASE):
            waiting = [
                pool.submit(client.completions.create, model=BASE, prompt="x", max_tokens=1) for _ in range(2)
            ]
            server.wait_until("two waiting", lambda: server.server.engine.snapshot().waiting == 2)
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as raised:
                    client.completions.create(model=BASE, prompt="x", max_tokens=1, stream=stream)
                assert raised.value.code == "queue_full"
                assert int(raised.value.response.headers["retry-after"]) >= 1
            # Several prompts are queued all or none.
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model=BASE, prompt=["x", "y"], max_tokens=1)
        assert all(each.result().choices for each in waiting)


def test_more_sequences_than_blocks_all_end(files: Files, tmp_path: Path) -> None:
    """When the KV cache is full the youngest waits and is computed again; nobody hears of it."""
    with (
        running(files, tmp_path, max_model_len=256, kv_cache_gib=0.0003) as server,
        server.client() as client,
    ):
        alone = client.completions.create(model=BASE, prompt="x", max_tokens=120, temperature=0)
        with ThreadPoolExecutor(6) as pool:
            answers = list(
                pool.map(
                    lambda _: client.completions.create(
                        model=BASE, prompt="x", max_tokens=120, temperature=0, extra_body={"ignore_eos": True}
                    ),
                    range(6),
                )
            )
        assert {answer.choices[0].text for answer in answers} == {alone.choices[0].text}
        assert (server.metric("manylora_preemptions_total") or 0) > 0
        server.wait_until_idle()
        server.check_integrity()

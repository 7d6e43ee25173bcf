"""/v1/files and /v1/batches through the openai client: what goes in comes out, each line once."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from manylora.adapters.errors import StoreFull
from manylora.adapters.keys import KeyTerms
from manylora.server.batches import records
from manylora.server.batches.runner import READ_AHEAD
from manylora.server.errors import QueueFull
from tests.server.api.running import BASE, Files, Running, running


def chat(custom_id: str, model: str = "a", **more: object) -> dict[str, Any]:
    message = {"role": "user", "content": f"hello {custom_id}"}
    body = {"model": model, "messages": [message], "max_tokens": 3, "temperature": 0, **more}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def begun(
    client: openai.OpenAI, content: bytes, endpoint: Any = "/v1/chat/completions", **more: Any
) -> Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def over(server: Running, client: openai.OpenAI, batch: Batch) -> Batch:
    server.wait_until("over", lambda: client.batches.retrieve(batch.id).status in records.OVER)
    return client.batches.retrieve(batch.id)


def told(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


# Files


def test_a_file_is_kept_listed_read_and_deleted(client: openai.OpenAI) -> None:
    before = {file.id for file in client.files.list()}
    content = "für \u2028 alle\n".encode() * 50_000
    file = client.files.create(file=("größe.jsonl", content), purpose="batch")
    assert (file.object, file.bytes, file.filename, file.purpose, file.status) == (
        "file",
        len(content),
        "größe.jsonl",
        "batch",
        "processed",
    )
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert {each.id for each in client.files.list()} - before == {file.id}
    assert client.files.delete(file.id).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            ask(file.id)
    assert {each.id for each in client.files.list()} == before


def test_lists_come_in_pages(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.jsonl", b"x"), purpose="batch").id for n in range(5)]
    newest = [file.id for file in client.files.list(limit=2)][:5]
    assert newest == made[::-1], "the client asks for the next page by itself"
    first = client.files.list(limit=2)
    assert first.has_more
    assert [file.id for file in first.data] == made[:-3:-1]
    ascending = client.files.list(order="asc", after=made[2], limit=9).data
    assert [file.id for file in ascending] == made[3:]
    assert not client.files.list(purpose="batch_output", after=made[0]).data
    for file_id in made:
        client.files.delete(file_id)


def test_a_file_may_go_by_itself(client: openai.OpenAI, server: Running) -> None:
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("x", b"x"), purpose="batch", expires_after=expiry)
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == 3600
    store = server.server.deps.batches.files
    with store.database._transaction() as connection:
        connection.execute("UPDATE files SET expires_at = 5 WHERE id = ?", (file.id,))
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    store.sweep()
    assert file.id not in store.database.file_ids()
    assert not (store._directory / "files" / file.id).exists()


@pytest.mark.parametrize(
    ("data", "parts", "param"),
    [
        ({"purpose": "fine-tune"}, {"file": b"x"}, "purpose"),
        ({}, {"file": b"x"}, "purpose"),
        ({"purpose": "batch"}, {"other": b"x"}, "other"),
        ({"purpose": "batch", "made_up": "1"}, {"file": b"x"}, "made_up"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at"}, {"file": b"x"}, "expires_after"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
            {"file": b"x"},
            "expires_after",
        ),
        ({"purpose": "batch" * 2000}, {"file": b"x"}, "purpose"),
    ],
)
def test_forms_that_make_no_sense_are_refused_and_leave_nothing(
    http: httpx.Client, server: Running, data: dict[str, str], parts: dict[str, bytes], param: str
) -> None:
    answer = http.post("/v1/files", data=data, files={k: io.BytesIO(v) for k, v in parts.items()})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not list((server.server.deps.batches.files._directory / "files").glob(".*"))


def test_what_is_no_form_is_refused(http: httpx.Client) -> None:
    without = http.post("/v1/files", files={"purpose": (None, "batch")})
    assert (without.status_code, without.json()["error"]["param"]) == (400, "file")
    for content, kind in (
        (b"{}", "application/json"),
        (b"x", "multipart/form-data"),
        (b"nothing of the kind", "multipart/form-data; boundary=b"),
        (b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nx', "multipart/form-data; boundary=b"),
    ):
        answer = http.post("/v1/files", content=content, headers={"content-type": kind})
        assert answer.status_code == 400, answer.text


@pytest.fixture(scope="module")
def small(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that holds little, and has a key for each of two."""
    data = tmp_path_factory.mktemp("small")
    with running(files, data, max_file_mib=0.01, files_gib=0.02 / 1024, max_body_mib=0.002) as server:
        yield server


def test_files_are_bounded_one_by_one_and_together(small: Running) -> None:
    with small.client() as client:
        with pytest.raises(openai.APIStatusError, match="over the limit") as too_large:
            client.files.create(file=("x", b"x" * 11_000), purpose="batch")
        assert too_large.value.status_code == 413
        kept = [client.files.create(file=("x", b"x" * 9_000), purpose="batch").id for _ in range(2)]
        with pytest.raises(openai.InternalServerError, match="files-gib") as full:
            client.files.create(file=("x", b"x" * 9_000), purpose="batch")
        assert full.value.status_code == 507
        for file_id in kept:
            client.files.delete(file_id)
        assert not list(client.files.list())
    left = [p.name for p in (small.server.deps.batches.files._directory / "files").iterdir()]
    assert left == []


def test_a_full_disk_is_507(server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manylora.server.batches.files.put_in_place", full)
    answer = http.post("/v1/files", data={"purpose": "batch"}, files={"file": b"x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "store_full")
    assert not list((server.server.deps.batches.files._directory / "files").glob(".*"))


# Batches


def test_a_batch_answers_each_line_as_it_would_be_answered_alone(
    server: Running, client: openai.OpenAI
) -> None:
    lines = [chat(f"id {n}", model) for n, model in enumerate(["a", "b", BASE, "a:0.5+b"] * 5)]
    batch = begun(client, jsonl(lines), metadata={"for": "tests"})
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", lines[0]["url"], "24h")
    done = over(server, client, batch)
    assert done.status == "completed", done
    assert done.metadata == {"for": "tests"}
    assert done.request_counts is not None
    counts = (done.request_counts.total, done.request_counts.completed, done.request_counts.failed)
    assert counts == (20, 20, 0)
    assert done.error_file_id is None
    assert None not in (done.in_progress_at, done.finalizing_at, done.completed_at)
    assert done.expires_at is not None
    assert done.expires_at - done.created_at == 24 * 3600
    out = told(client, done.output_file_id)
    assert [each["custom_id"] for each in out] == [line["custom_id"] for line in lines]
    assert len({each["id"] for each in out}) == 20
    for line, each in zip(lines[:4], out, strict=False):
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        assert each["response"]["request_id"]
        alone = client.chat.completions.create(**line["body"])
        body = each["response"]["body"]
        assert body["choices"][0]["message"]["content"] == alone.choices[0].message.content
    used = sum(each["response"]["body"]["usage"]["total_tokens"] for each in out)
    assert done.usage is not None
    assert done.usage.total_tokens == used > 0
    output = client.files.retrieve(done.output_file_id or "")
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert not (server.server.deps.batches.files.input_of(batch.id)).exists()


def test_no_line_of_many_is_left_out(server: Running, client: openai.OpenAI) -> None:
    """More than are read at once, and than are with the engine."""
    count = 2 * READ_AHEAD + 5
    done = over(
        server, client, begun(client, jsonl([chat(str(n), BASE, max_tokens=1) for n in range(count)]))
    )
    assert [each["custom_id"] for each in told(client, done.output_file_id)] == [str(n) for n in range(count)]


def test_completions_and_embeddings_may_be_batches_too(server: Running, client: openai.OpenAI) -> None:
    for endpoint, body in (
        ("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 2}),
        ("/v1/embeddings", {"model": "a", "input": "x", "encoding_format": "base64"}),
    ):
        line = {"custom_id": "1", "method": "POST", "url": endpoint, "body": body}
        done = over(server, client, begun(client, jsonl([line]), endpoint))
        [out] = told(client, done.output_file_id)
        assert out["response"]["status_code"] == 200
        assert done.to_dict()["model"] == "a"


def test_lines_that_are_refused_are_in_a_file_of_their_own(server: Running, client: openai.OpenAI) -> None:
    lines = [chat("good"), chat("bad", temperature=9), chat("unknown", "nobody")]
    done = over(server, client, begun(client, jsonl(lines)))
    assert done.status == "completed"
    assert [each["custom_id"] for each in told(client, done.output_file_id)] == ["good"]
    errors = told(client, done.error_file_id)
    assert [(each["custom_id"], each["response"]["status_code"]) for each in errors] == [
        ("bad", 400),
        ("unknown", 404),
    ]
    assert errors[0]["response"]["body"]["error"]["param"] == "temperature"
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 2)


def test_an_output_is_read_line_by_line_whatever_is_in_its_answers(
    server: Running, client: openai.OpenAI
) -> None:
    odd = "next\u0085line\u2028para\u2029 \x0c \u00e9"
    line = chat("1", messages=[{"role": "user", "content": "x"}], max_tokens=1)
    del line["body"]["messages"]
    line["url"], line["body"] = (
        "/v1/completions",
        {"model": "a", "prompt": odd, "echo": True, "max_tokens": 0},
    )
    done = over(server, client, begun(client, jsonl([line]), "/v1/completions"))
    [out] = told(client, done.output_file_id)
    assert out["response"]["body"]["choices"][0]["text"] == odd


@pytest.mark.parametrize(
    ("content", "codes"),
    [
        (b"", ["empty_file"]),
        (b"\n \n", ["empty_file"]),
        (b"{", ["invalid_json_line"]),
        (b"[]\n\xff\n", ["invalid_json_line", "invalid_json_line"]),
        (jsonl([chat("1"), chat("2"), chat("1")]), ["duplicate_custom_id"]),
        (jsonl([{**chat("1"), "custom_id": 5}]), ["invalid_custom_id"]),
        (jsonl([{**chat("1"), "method": "GET"}]), ["invalid_method"]),
        (jsonl([{**chat("1"), "url": "/v1/completions"}]), ["mismatched_endpoint"]),
        (jsonl([{**chat("1"), "body": "x"}]), ["invalid_body"]),
        (jsonl([{**chat("1"), "priority": 1}]), ["unknown_field"]),
        (jsonl([chat("1", stream=True)]), ["invalid_body"]),
        (b"{}\n" * 101, ["invalid_custom_id"] * 100),
    ],
)
def test_an_input_with_a_fault_is_answered_not_at_all(
    server: Running, client: openai.OpenAI, content: bytes, codes: list[str]
) -> None:
    done = over(server, client, begun(client, content))
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data is not None
    assert [each.code for each in done.errors.data] == codes
    assert done.failed_at is not None
    assert (done.output_file_id, done.error_file_id) == (None, None)


def test_an_input_is_bounded(
    server: Running, client: openai.OpenAI, small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.server.batches.lines.MOST_LINES", 3)
    done = over(server, client, begun(client, jsonl([chat(str(n)) for n in range(4)])))
    assert done.errors is not None
    assert [each.code for each in done.errors.data or []] == ["too_many_tasks"]
    monkeypatch.setattr("manylora.server.batches.lines.MOST_BYTES", 3)
    done = over(server, client, begun(client, jsonl([chat("1")])))
    assert done.errors is not None
    assert [each.code for each in done.errors.data or []] == ["file_too_large"]
    monkeypatch.undo()
    with small.client() as other:
        done = over(small, other, begun(other, jsonl([chat("x" * 400, BASE, user="x" * 2000)])))
        assert done.errors is not None
        assert [each.code for each in done.errors.data or []] == ["line_too_long"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"made_up": 1}, "made_up"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(http: httpx.Client, more: dict[str, Any], param: str) -> None:
    body = {"input_file_id": "x", "endpoint": "/v1/completions", "completion_window": "24h", **more}
    answer = http.post("/v1/batches", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_batch_waits_behind_those_who_ask_now(server: Running, client: openai.OpenAI) -> None:
    lines = [chat(str(n), max_tokens=60, ignore_eos=True) for n in range(40)]
    batch = begun(client, jsonl(lines))
    server.wait_until_busy()
    asked = [request.priority for request in _requests(server)]
    live = client.chat.completions.create(**chat("live", "b")["body"])
    assert live.choices
    now = client.batches.retrieve(batch.id)
    assert now.status == "in_progress", "one who asked at once waited for the whole batch"
    assert min(asked) > 1 << 31
    assert len(asked) <= 16
    client.batches.cancel(batch.id)
    over(server, client, batch)


def _requests(server: Running) -> list[Any]:
    return [live.request for live in server.server.engine._engine.requests]


def test_a_batch_that_is_cancelled_keeps_what_is_answered_and_tells_of_the_rest(
    server: Running, client: openai.OpenAI
) -> None:
    lines = [chat(str(n), max_tokens=100, ignore_eos=True) for n in range(60)]
    batch = begun(client, jsonl(lines))

    def some_are_answered() -> bool:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed > 0

    server.wait_until("begun", some_are_answered)
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status in ("cancelling", "cancelled")
    done = over(server, client, batch)
    assert done.status == "cancelled"
    assert done.cancelled_at is not None
    good, rest = told(client, done.output_file_id), told(client, done.error_file_id)
    assert sorted(int(each["custom_id"]) for each in [*good, *rest]) == list(range(60))
    assert {each["error"]["code"] for each in rest} == {"batch_cancelled"}
    assert {each["response"] is None for each in rest} == {True}
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.batches.cancel(batch.id)
    server.wait_until_idle()


def test_a_batch_whose_time_is_over_keeps_what_is_answered(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.server.batches.runner.DAY", 2)
    batch = begun(client, jsonl([chat(str(n), max_tokens=900, ignore_eos=True) for n in range(60)]))
    done = over(server, client, batch)
    assert done.status == "expired"
    assert done.expired_at is not None
    answered = told(client, done.output_file_id) + told(client, done.error_file_id)
    assert len(answered) == 60
    codes = [each["error"]["code"] for each in answered if each["error"] is not None]
    assert set(codes) == {"batch_expired"}


def test_the_input_may_be_deleted_while_it_is_read(server: Running, client: openai.OpenAI) -> None:
    batch = begun(client, jsonl([chat(str(n)) for n in range(10)]))
    client.files.delete(batch.input_file_id)
    done = over(server, client, batch)
    assert len(told(client, done.output_file_id)) == 10


def test_batches_are_listed_the_newest_first(server: Running, client: openai.OpenAI) -> None:
    made = [begun(client, jsonl([chat("1")])).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == made[::-1]
    page = client.batches.list(limit=1, after=made[2])
    assert [batch.id for batch in page.data] == [made[1]]
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")
    for each in made:
        server.wait_until("over", lambda each=each: client.batches.retrieve(each).status in records.OVER)  # type: ignore[misc]


def test_who_goes_on_after_a_restart_answers_each_line_once(files: Files, tmp_path: Path) -> None:
    """The server ends in the middle of a batch; the next one on the same data goes on where it was."""
    lines = [chat(str(n), BASE, max_tokens=40, ignore_eos=True) for n in range(80)]
    with running(files, tmp_path) as server, server.client() as client:
        batch = begun(client, jsonl(lines))

        def some() -> bool:
            counts = client.batches.retrieve(batch.id).request_counts
            return counts is not None and counts.completed > 5

        server.wait_until("begun", some)
    with running(files, tmp_path) as server, server.client() as client:
        now = client.batches.retrieve(batch.id)
        assert now.status in ("in_progress", "finalizing", "completed")
        done = over(server, client, batch)
        out = told(client, done.output_file_id)
        assert [each["custom_id"] for each in out] == [str(n) for n in range(80)]
        assert done.error_file_id is None


def test_a_fault_of_the_servers_is_one_lines_alone(server: Running, client: openai.OpenAI) -> None:
    with server.broken_tokenizer():
        done = over(server, client, begun(client, jsonl([chat("1")])))
    [out] = told(client, done.error_file_id)
    assert (done.status, out["response"]["status_code"]) == ("completed", 500)
    assert out["response"]["body"]["error"]["code"] == "internal_error"


def test_a_busy_server_is_asked_again(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, refused = server.server.engine, list[object]()
    submit = engine.submit_together

    def busy(requests: Any) -> Any:
        if len(refused) < 3:
            refused.append(requests)
            raise QueueFull("full", retry_after=0.01)
        return submit(requests)

    monkeypatch.setattr(engine, "submit_together", busy)
    done = over(server, client, begun(client, jsonl([chat("1"), chat("2")])))
    assert (done.status, done.error_file_id, len(refused)) == ("completed", None, 3)


def test_a_full_disk_keeps_a_batch_waiting_and_loses_nothing(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = server.server.deps.batches.files.database
    faults = dict.fromkeys(("add_result", "put_batch"), 2)

    def full_at_first(name: str) -> Any:
        call = getattr(database, name)

        def attempt(*arguments: Any, **named: Any) -> Any:
            faults[name] -= 1
            if faults[name] >= 0:
                raise StoreFull("the disk is full")
            return call(*arguments, **named)

        return attempt

    file = client.files.create(file=("in.jsonl", jsonl([chat("1"), chat("2")])), purpose="batch")
    for name in faults:
        monkeypatch.setattr(database, name, full_at_first(name))
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    done = over(server, client, batch)
    assert (done.status, len(told(client, done.output_file_id)), done.error_file_id) == ("completed", 2, None)
    assert max(faults.values()) < 0


# Whose


async def _key(ring: Any, tenant: str) -> tuple[str, str]:
    record, secret = await ring.create(KeyTerms(tenant=tenant))
    return record.id, secret


def test_files_and_batches_are_their_makers_alone(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server:
        ring = server.server.deps.keys
        keys: dict[str, Any] = {name: server.start(_key(ring, name)).result(30) for name in ("one", "two")}
        keys["also one"] = server.start(_key(ring, "one")).result(30)
        with (
            server.client(keys["one"][1]) as one,
            server.client(keys["two"][1]) as two,
            server.client(keys["also one"][1]) as also,
        ):
            batch = begun(one, jsonl([chat("1", BASE)]))
            done = over(server, one, batch)
            assert done.status == "completed"
            mine = {file.id for file in one.files.list()}
            assert (
                mine == {file.id for file in also.files.list()} == {done.output_file_id, done.input_file_id}
            )
            assert [each.id for each in also.batches.list()] == [batch.id]
            assert not list(two.files.list())
            assert not list(two.batches.list())
            for ask, name in (
                (two.files.retrieve, done.input_file_id),
                (two.files.content, done.output_file_id),
                (two.files.delete, done.input_file_id),
                (two.batches.retrieve, batch.id),
                (two.batches.cancel, batch.id),
            ):
                with pytest.raises(openai.NotFoundError):
                    ask(name)  # type: ignore[arg-type]
            with pytest.raises(openai.BadRequestError, match="No such File"):
                two.batches.create(
                    input_file_id=done.input_file_id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                )
            with server.held():
                late = begun(one, jsonl([chat("1", BASE)]))
                server.start(ring.revoke(keys["one"][0])).result(30)
            ended = over(server, also, late)
            # What was with the engine already goes on; else the key opens no more.
            answers = told(also, ended.output_file_id) + told(also, ended.error_file_id)
            assert [each["response"]["status_code"] for each in answers] in ([200], [401])
            again = over(server, also, begun(also, jsonl([chat("1", BASE)])))
            assert again.error_file_id is None

"""Adapters that are sent: as files or as an archive, and every way of sending them wrong."""

import errno
import io
import json
import os
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from manylora.adapters.sending import opened_parts
from tests.server.api.running import Files, Running
from tests.server.api.test_adapters import answer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _leave_nothing(server: Running, http: httpx.Client) -> Iterator[None]:
    yield
    for adapter in http.get("/adapters").json()["data"]:
        if adapter["name"] not in ("a", "b", "c"):
            http.delete(f"/adapters/{adapter['name']}").raise_for_status()
    server.wait_until("swept", lambda: staged(server) == [])


def staged(server: Running) -> list[str]:
    store = server.server.catalog._store
    return os.listdir(store._root / ".staging")


def send(http: httpx.Client, name: str, directory: Path, **query: str) -> httpx.Response:
    with opened_parts(directory) as parts:
        return http.post("/adapters", data={"name": name}, files=parts, params=query)


def zipped(directory: Path) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for path in directory.iterdir():
            archive.write(path, f"adapter/{path.name}")
    return raw.getvalue()


def test_files_are_served_as_the_directory_that_they_are_from(http: httpx.Client, files: Files) -> None:
    sent = send(http, "sent", files.adapters / "b")
    assert sent.status_code == 201, sent.text
    assert (sent.json()["src"], sent.json()["digest"]) == ("upload", http.get("/adapters/b").json()["digest"])
    assert answer(http, "sent") == answer(http, "b")
    assert send(http, "sent", files.adapters / "b").status_code == 200
    other = send(http, "sent", files.adapters / "a")
    assert other.json()["error"]["code"] == "adapter_name_taken"
    with opened_parts(files.adapters / "a") as parts:
        replaced = http.put("/adapters/sent", files=parts).json()
    assert (replaced["version"], replaced["digest"]) == (2, http.get("/adapters/a").json()["digest"])


def test_an_archive_is_one_part(http: httpx.Client, files: Files) -> None:
    archive = {"file": ("b.zip", zipped(files.adapters / "b"))}
    sent = http.post("/adapters", data={"name": "sent", "preload": "true"}, files=archive)
    assert sent.status_code == 201, sent.text
    assert sent.json()["preload"] is True
    assert answer(http, "sent") == answer(http, "b")


def part(name: str, body: bytes = b"{}") -> tuple[str, tuple[str, bytes]]:
    return ("file", (name, body))


@pytest.mark.parametrize(
    ("fields", "parts", "status", "code", "why"),
    [
        ({"name": "x"}, [], 400, "adapter_not_found", "no files"),
        ({"name": "x"}, [part(CONFIG)], 400, "invalid_adapter", "missing"),
        ({"name": "x"}, [part(WEIGHTS)], 400, "adapter_not_found", "adapter_config"),
        ({"name": "x"}, [part(CONFIG), part(CONFIG)], 400, "invalid_adapter", "twice"),
        ({"name": "x"}, [part("../adapter_config.json")], 400, "invalid_adapter", "no file of an adapter"),
        ({"name": "x"}, [part("/etc/passwd")], 400, "invalid_adapter", "no file of an adapter"),
        ({"name": "x"}, [part("adapter_model.bin")], 400, "unsupported_adapter", "pickle"),
        ({"name": "x"}, [part("a.zip", b"PK"), part(CONFIG)], 400, "invalid_adapter", "alone"),
        ({"name": "x"}, [part("a.zip", b"PK")], 400, "invalid_adapter", "no archive"),
        ({"name": "x"}, [part(CONFIG, bytes((1 << 20) + 1))], 400, "invalid_adapter", "over"),
        ({"name": "x"}, [part(CONFIG), part(WEIGHTS, b"cut")], 400, "unsupported_adapter", CONFIG),
        ({}, [part(CONFIG)], 400, None, "name"),
        ({"name": "a/../b"}, [part(CONFIG), part(WEIGHTS)], 400, "invalid_adapter", "name"),
        ({"name": "x", "preload": "yes"}, [part(CONFIG)], 400, None, "true or false"),
        ({"name": "x", "src": "b"}, [part(CONFIG)], 400, None, "src: not a field"),
    ],
)
def test_what_makes_no_adapter_is_refused(
    http: httpx.Client,
    fields: dict[str, str],
    parts: list[tuple[str, tuple[str, bytes]]],
    status: int,
    code: str | None,
    why: str,
) -> None:
    form = [*((name, (None, value.encode())) for name, value in fields.items()), *parts]
    refused = http.post("/adapters", files=form)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (status, code), error
    assert why in error["message"]
    assert http.get("/adapters/x").status_code == 404


def test_a_form_that_is_none_or_is_not_wanted_is_told(http: httpx.Client) -> None:
    json_wanted = http.post("/adapters/a/rollback", data={"version": "1"}, files=[part(CONFIG)])
    assert json_wanted.json()["error"]["message"] == "the body is a form, and this route takes a JSON object"
    unbounded = http.post("/adapters", content=b"x", headers={"content-type": "multipart/form-data"})
    assert "with a boundary" in unbounded.json()["error"]["message"]
    assert (json_wanted.status_code, unbounded.status_code) == (400, 400)


def test_a_disk_that_is_full_in_the_end_is_told(
    http: httpx.Client, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    archive = {"file": ("b.zip", zipped(files.adapters / "b"))}
    refused = http.post("/adapters", data={"name": "sent"}, files=archive)
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "store_full")


def test_a_claim_that_is_too_large_is_refused_before_it_is_sent(server: Running) -> None:
    head = (
        "POST /adapters HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        f"content-length: {50 << 30}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_leaves_while_it_sends_leaves_nothing(server: Running) -> None:
    head = (
        "POST /adapters HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        "content-length: 3000000\r\n\r\n"
        '--b\r\ncontent-disposition: form-data; name="name"\r\n\r\nx\r\n'
        f'--b\r\ncontent-disposition: form-data; name="file"; filename="{WEIGHTS}"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode() + bytes(2 << 20))
        server.wait_until("staged", lambda: staged(server) != [])
    server.wait_until("swept", lambda: staged(server) == [])


def test_a_token_is_no_part_of_any_answer(http: httpx.Client, server: Running) -> None:
    with server.logged() as lines:
        refused = http.post("/adapters", json={"name": "x", "src": "hf://org/name", "token": "s3cret-t0ken"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "source_forbidden")
        local = http.post("/adapters", json={"name": "x", "src": "b", "token": "s3cret-t0ken"})
        assert local.status_code == 400
        server.wait_until("logged", lambda: len(lines) >= 2)
    assert "s3cret" not in json.dumps(lines, default=str) + refused.text + local.text

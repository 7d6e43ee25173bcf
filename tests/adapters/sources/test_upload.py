"""What a client sends is written as it comes, is a source once it is whole, and leaves nothing behind."""

import io
import os
import socket
import zipfile
from pathlib import Path

import pytest

from manylora.adapters.errors import AdapterError, AdapterNotFound, InvalidAdapter, UnsupportedAdapter
from manylora.adapters.files import digest_of
from manylora.adapters.sending import opened_parts
from manylora.adapters.store import AdapterStore

LIMIT = 1 << 20


def staging(tmp_path: Path) -> list[str]:
    return os.listdir(tmp_path / "store" / ".staging")


def test_what_was_sent_is_published_once(store: AdapterStore, adapter: Path, tmp_path: Path) -> None:
    upload = store.receive(LIMIT)
    with opened_parts(adapter) as parts:
        for _, (name, file) in parts:
            upload.begin(name)
            while chunk := file.read(1000):
                upload.write(chunk)
    source = upload.end()
    staged = store.stage(source)
    assert staged.digest == digest_of(adapter, LIMIT)
    store.publish(staged)
    upload.discard()
    assert staging(tmp_path) == []


def test_bytes_are_counted_as_they_come(store: AdapterStore, tmp_path: Path) -> None:
    upload = store.receive(2500)
    upload.begin("adapter_model.safetensors")
    upload.write(bytes(1500))
    upload.begin("tokenizer.json")
    with pytest.raises(InvalidAdapter, match=r"tokenizer\.json"):
        upload.write(bytes(1500))
    upload.discard()
    assert staging(tmp_path) == []


CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@pytest.mark.parametrize(
    ("names", "kind", "why"),
    [
        ((), AdapterNotFound, "no files"),
        (("../" + CONFIG,), InvalidAdapter, "no file of an adapter"),
        (("notes.txt",), InvalidAdapter, "no file of an adapter"),
        ((CONFIG, CONFIG), InvalidAdapter, "twice"),
        (("a.zip", "a.zip"), InvalidAdapter, "twice"),
        (("a.zip", CONFIG), InvalidAdapter, "alone"),
        ((CONFIG, "a.tar.gz"), InvalidAdapter, "alone"),
        ((CONFIG, PICKLED), UnsupportedAdapter, "pickle"),
        ((CONFIG, WEIGHTS, PICKLED), InvalidAdapter, "no file of an adapter"),
    ],
)
def test_what_is_sent_is_known_files_or_one_archive(
    store: AdapterStore, tmp_path: Path, names: tuple[str, ...], kind: type[AdapterError], why: str
) -> None:
    upload = store.receive(LIMIT)
    for name in names[:-1]:
        upload.begin(name)
    with pytest.raises(kind, match=why):
        upload.begin(names[-1]) if names else upload.end()
    upload.discard()
    assert staging(tmp_path) == []


def test_an_archive_and_a_file_may_have_all_that_an_adapter_may(store: AdapterStore) -> None:
    for name, is_archive in (("a.TGZ", True), (WEIGHTS, False)):
        upload = store.receive(2500)
        upload.begin(name)
        upload.write(bytes(2500))
        assert upload.end().is_archive is is_archive
        with pytest.raises(InvalidAdapter, match="over what it may have"):
            upload.write(b"x")
        upload.discard()


def test_what_a_killed_server_left_is_swept(store: AdapterStore, adapter: Path, tmp_path: Path) -> None:
    store.receive(LIMIT).begin("a.zip")
    (tmp_path / "store" / ".staging" / "0123.archive").mkdir()
    assert AdapterStore(tmp_path / "store").sweep(()) == 2
    assert staging(tmp_path) == []


@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "device"])
def test_a_client_sends_plain_files_alone(adapter: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a server take anything else from a directory: it would wait for a pipe for ever."""
    path = adapter / "tokenizer_config.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(adapter)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InvalidAdapter, match="tokenizer_config"), opened_parts(adapter):
        pass


def test_what_comes_out_of_an_archive_has_the_upload_s_bound(store: AdapterStore, tmp_path: Path) -> None:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", "{}")
        archive.writestr("adapter_model.safetensors", bytes(LIMIT))
    upload = store.receive(LIMIT // 2)
    upload.begin("a.zip")
    upload.write(raw.getvalue())
    with pytest.raises(InvalidAdapter, match=rf"{LIMIT} bytes; at most {LIMIT // 2 - 2}"):
        store.stage(upload.end())
    upload.discard()
    assert staging(tmp_path) == []

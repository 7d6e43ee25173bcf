"""Archives from strangers: what is in them comes out, and nothing else happens."""

import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from manylora.adapters.errors import AdapterError, AdapterNotFound, InvalidAdapter, UnsupportedAdapter
from manylora.adapters.sources.archive import MOST_ENTRIES, unpack

LIMIT = 1 << 20
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "README.md": b"hello"}

TOO_MUCH = {**FILES, "adapter_model.safetensors": bytes(700 << 10), "tokenizer.json": bytes(700 << 10)}
"""Each might be there, and both together not."""


def zipped(files: dict[str, bytes], *odd: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
        for info, body in odd:
            archive.writestr(info, body)
    return raw.getvalue()


def tarred(files: dict[str, bytes], *odd: tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as archive:  # type: ignore[call-overload]
        for info in odd:
            archive.addfile(info)
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return raw.getvalue()


def out_of(tmp_path: Path, raw: bytes) -> dict[str, bytes]:
    (tmp_path / "archive").write_bytes(raw)
    folder = tmp_path / "out"
    unpack(tmp_path / "archive", folder, LIMIT)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("made", [zipped, tarred, lambda files: tarred(files, mode="w")])
@pytest.mark.parametrize("folder", ["", "one/", "./one/"])
def test_known_files_come_out(tmp_path: Path, made: Callable[..., bytes], folder: str) -> None:
    files = {f"{folder}{name}": body for name, body in FILES.items()}
    files[f"{folder}1_Pooling/config.json"] = b"[]"
    files["__MACOSX/._adapter_config.json"] = b"?"
    found = out_of(tmp_path, made(files))
    assert found == {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"weights",
        "1_Pooling/config.json": b"[]",
    }


def test_folders_of_an_archive_are_passed_over(tmp_path: Path) -> None:
    for number, raw in enumerate((odd_tar("one", tarfile.DIRTYPE), odd_zip("one/"))):
        (tmp_path / str(number)).mkdir()
        assert out_of(tmp_path / str(number), raw).keys() == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }


def odd_zip(name: str, mode: int = 0o644 | stat.S_IFREG) -> bytes:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return zipped(FILES, (info, b"/etc/passwd"))


def odd_tar(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd"
    return tarred(FILES, info)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        *((odd_zip(name), "leads out") for name in ("../x", "/etc/x", "a/../../x", "..\\x", "C:/x")),
        *((odd_tar(name), "leads out") for name in ("../x", "/etc/x", "a/../../x")),
        *(
            (odd_zip("x", kind | 0o777), "link, a device or a pipe")
            for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR)
        ),
        *(
            (odd_tar("adapter_config.json", kind), "link, a device or a pipe")
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
        ),
        (odd_tar("x", tarfile.GNUTYPE_SPARSE), "link, a device or a pipe"),
        (odd_tar("../x", tarfile.DIRTYPE), "leads out"),
        (odd_zip("../x/"), "leads out"),
    ],
)
def test_what_leads_out_or_is_no_file_refuses_the_archive(tmp_path: Path, raw: bytes, why: str) -> None:
    with pytest.raises(InvalidAdapter, match=why):
        out_of(tmp_path, raw)
    assert set(os.listdir(tmp_path)) == {"archive", "out"}
    assert os.listdir(tmp_path / "out") == []


def encrypted() -> bytes:
    raw = bytearray(zipped(FILES))
    at = raw.index(b"PK\x01\x02") + 8
    raw[at] |= 1
    return bytes(raw)


def packed(method: int, name: str = "adapter_config.json") -> bytes:
    """Return a zip with an entry that is compressed so."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for each, body in FILES.items():
            archive.writestr(each, body * 100, method if each == name else zipfile.ZIP_STORED)
    return raw.getvalue()


def claiming(size: int) -> bytes:
    """Return a tar whose first entry says to be so large."""
    info = tarfile.TarInfo("notes.txt")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + tarred(FILES, mode="w")


def pax_of(size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    info.size = size
    return info.tobuf() + bytes(size)


def many_zip() -> bytes:
    return zipped({**FILES, **{f"{number}.txt": b"" for number in range(MOST_ENTRIES)}})


def many_folders() -> bytes:
    folders = [tarfile.TarInfo(f"{number}") for number in range(MOST_ENTRIES)]
    for folder in folders:
        folder.type = tarfile.DIRTYPE
    return tarred(FILES, *folders)


def many_tar() -> bytes:
    return tarred({**{f"{number}.txt": b"" for number in range(MOST_ENTRIES)}, **FILES})


def large_directory() -> bytes:
    """Return a zip whose central directory is said to have 3 GiB."""
    raw = bytearray(zipped(FILES) + bytes(8 << 20))
    end = raw.index(b"PK\x05\x06")
    tail = raw[end : end + 22]
    struct.pack_into("<I", tail, 12, 5 << 20)
    struct.pack_into("<I", tail, 16, 0)
    return bytes(raw[:end]) + bytes(5 << 20) + bytes(tail)


@pytest.mark.parametrize(
    ("made", "kind", "why"),
    [
        (lambda: zipped({**FILES, "adapter_model.safetensors": bytes(5 << 20)}), InvalidAdapter, "at most"),
        (lambda: tarred({**FILES, "adapter_model.safetensors": bytes(5 << 20)}), InvalidAdapter, "at most"),
        (
            lambda: zipped({**FILES, "adapter_config.json": bytes(1 << 20 | 1)}),
            InvalidAdapter,
            "adapter_config.*at most",
        ),
        (lambda: zipped(TOO_MUCH), InvalidAdapter, r"tokenizer\.json: \d+ bytes; at most"),
        (lambda: tarred(TOO_MUCH), InvalidAdapter, r"tokenizer\.json: \d+ bytes; at most"),
        (lambda: claiming(50 << 30), InvalidAdapter, "larger than"),
        (lambda: pax_of(9 << 20), InvalidAdapter, "tables"),
        (many_zip, InvalidAdapter, "entries"),
        (many_tar, InvalidAdapter, "entries"),
        (many_folders, InvalidAdapter, "entries"),
        (large_directory, InvalidAdapter, "tables"),
        (encrypted, UnsupportedAdapter, "encrypted"),
        (
            lambda: packed(zipfile.ZIP_LZMA),
            UnsupportedAdapter,
            r"adapter_config\.json' in the archive is compressed",
        ),
        (lambda: packed(zipfile.ZIP_BZIP2, "README.md"), UnsupportedAdapter, r"README\.md'.*use deflate"),
        (lambda: zipped(FILES)[:-30], InvalidAdapter, "as zip"),
        (lambda: tarred(FILES)[:-30], InvalidAdapter, r"as tar\.gz"),
        (lambda: tarred(FILES, mode="w")[:1540], InvalidAdapter, "as tar"),
        (lambda: b"Rar!", InvalidAdapter, "no archive"),
        (lambda: b"", InvalidAdapter, "no archive"),
        (lambda: zipped({"README.md": b""}), AdapterNotFound, "no adapter_config"),
        (lambda: zipped({"a/b/adapter_config.json": b"{}"}), InvalidAdapter, "one folder"),
        (
            lambda: zipped({"a/adapter_config.json": b"{}", "b/adapter_config.json": b"{}"}),
            InvalidAdapter,
            "2 adapters",
        ),
        (lambda: tarred({**FILES, "./adapter_config.json": b"[]"}), InvalidAdapter, "twice"),
        (
            lambda: zipped({"adapter_config.json": b"{}", "adapter_model.bin": b""}),
            UnsupportedAdapter,
            "pickle",
        ),
    ],
)
def test_bombs_and_broken_archives_are_refused(
    tmp_path: Path, made: Callable[[], bytes], kind: type[AdapterError], why: str
) -> None:
    with pytest.raises(kind, match=why):
        out_of(tmp_path, made())

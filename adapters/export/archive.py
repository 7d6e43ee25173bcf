"""The adapter alone, as an archive whose bytes depend on the adapter's files and on nothing else."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from manylora.adapters.export.companions import MANIFEST
from manylora.adapters.files import KNOWN_FILES

SUFFIXES = (".tar.gz", ".tgz", ".zip")
_MORE_FILES = (
    "README.md",
    MANIFEST,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""zip knows no earlier time."""


def archived_files(adapter: Path) -> tuple[str, ...]:
    """Return the names of the files that belong to an adapter, sorted."""
    return tuple(sorted(name for name in (*KNOWN_FILES, *_MORE_FILES) if (adapter / name).is_file()))


def write_archive(adapter: Path, path: Path, top: str) -> None:
    """Write the adapter's files below the directory ``top`` of a .tar.gz, .tgz or .zip at ``path``."""
    if path.name.endswith(".zip"):
        _write_zip(adapter, path, top)
    else:
        _write_tar(adapter, path, top)


def _write_zip(adapter: Path, path: Path, top: str) -> None:
    with zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED) as archive:
        for name in archived_files(adapter):
            info = zipfile.ZipInfo(f"{top}/{name}", _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            with (adapter / name).open("rb") as source, archive.open(info, "w") as out:
                for piece in _pieces(source):
                    out.write(piece)


def _write_tar(adapter: Path, path: Path, top: str) -> None:
    # The header of gzip would hold a name and the time.
    with (
        path.open("xb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in archived_files(adapter):
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size = (adapter / name).stat().st_size
            info.mode = 0o644
            with (adapter / name).open("rb") as source:
                archive.addfile(info, source)


def _pieces(source: io.BufferedReader) -> Iterator[bytes]:
    while piece := source.read(1 << 20):
        yield piece

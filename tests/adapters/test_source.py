"""Sources: directories inside the root, however they are written, and nothing else."""

from pathlib import Path

import pytest

from manylora.adapters.errors import (
    AdapterError,
    AdapterNotFound,
    AdapterPathForbidden,
    InvalidAdapter,
    UnsupportedAdapter,
)
from manylora.adapters.source import resolve_source
from tests.adapters.making import write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "root" / "an adapter")
    write(tmp_path / "outside")
    return tmp_path / "root"


def test_paths_and_file_urls_inside_the_root(root: Path) -> None:
    wanted = (root / "an adapter").resolve()
    (root / "link").symlink_to("an adapter")
    for src in (str(wanted), "an adapter", f"{root}/x/../an adapter", "link", f"file://{root}/an%20adapter"):
        assert resolve_source(src, root) == wanted
    assert resolve_source(f"file://localhost{root}/an%20adapter", root) == wanted


def test_nothing_outside_the_root(root: Path, tmp_path: Path) -> None:
    (root / "way_out").symlink_to(tmp_path / "outside")
    for src in (
        "way_out",
        "../outside",
        str(tmp_path / "outside"),
        "/nowhere",
        f"file://{root}/%2e%2e/outside",
    ):
        with pytest.raises(AdapterPathForbidden):
            resolve_source(src, root)


def test_no_link_inside_leads_out(root: Path, tmp_path: Path) -> None:
    weights = root / "an adapter" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    with pytest.raises(AdapterPathForbidden, match="adapter_model"):
        resolve_source("an adapter", root)


@pytest.mark.parametrize(
    ("src", "kind", "why"),
    [
        ("s3://bucket/adapter", UnsupportedAdapter, "s3://"),
        ("https://host/adapter", UnsupportedAdapter, "file://"),
        ("organisation/adapter", AdapterNotFound, "hub"),
        ("an adapter/adapter_config.json", AdapterNotFound, "directory"),
        ("loop", AdapterNotFound, "loop"),
        ("", InvalidAdapter, "empty"),
        ("a\0b", InvalidAdapter, "NUL"),
        ("file:///a%00b", InvalidAdapter, "NUL"),
        ("file://host/path", InvalidAdapter, "file URL"),
    ],
)
def test_other_sources_are_refused(root: Path, src: str, kind: type[AdapterError], why: str) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises(kind, match=why):
        resolve_source(src, root)

"""An adapter, a store, and a web server on this machine that may be asked."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora.adapters.sources.allowed import Allowed
from manylora.adapters.sources.finding import Finding
from manylora.adapters.sources.web import WebLimits
from manylora.adapters.store import AdapterStore
from tests.adapters.making import write
from tests.adapters.sources.web_host import Host, web_host

PATIENT = WebLimits(seconds=30.0, allow_private=True, pauses=(0.0, 0.0))


@pytest.fixture
def host() -> Iterator[Host]:
    with web_host() as host:
        yield host


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    write(directory, files={"chat_template.jinja": "hello"})
    return directory


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store", max_bytes=1 << 20)


@pytest.fixture
def finding(tmp_path: Path, host: Host) -> Finding:
    """Where a caller may find adapters: below the host's /models, and nowhere on the disk."""
    (tmp_path / "root").mkdir()
    allowed = Allowed.of([f"{host.url}/models/", "hf://org"])
    return Finding(tmp_path / "root", allowed=allowed, limits=PATIENT, own_token=lambda: None)

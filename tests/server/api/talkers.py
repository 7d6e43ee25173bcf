"""A server with an adapter for each of some chat templates; all the same noise."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx
import pytest

from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter
from tests.server.api.running import Files, Running, running


@contextmanager
def talking(files: Files, places: pytest.TempPathFactory, templates: Mapping[str, str]) -> Iterator[Running]:
    """Serve an adapter of each template's name."""
    own = Files(places.mktemp("talkers"))
    own.base.symlink_to(files.base)
    for name, template in templates.items():
        folder = write_adapter(own.adapters / name, files.base, AdapterShape(rank=4, seed=7))
        (folder / "chat_template.jinja").write_text(template)
    with running(own, places.mktemp("data")) as server:
        for name in templates:
            httpx.post(f"{server.url}/adapters", json={"name": name, "src": name}).raise_for_status()
        yield server

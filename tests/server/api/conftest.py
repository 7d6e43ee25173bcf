"""One server for the whole room, with three adapters; tests that need other settings start their own."""

from collections.abc import Iterator

import httpx
import openai
import pytest
import structlog

from tests.server.api.running import Files, Running, running, write_files


@pytest.fixture(autouse=True, scope="session")
def _plain_logs() -> Iterator[None]:
    """structlog's own default draws tracebacks with every local variable, which takes seconds."""
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.JSONRenderer(default=str)]
    )
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def shared_server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(files, tmp_path_factory.mktemp("data")) as server:
        for name in ("a", "b", "c"):
            httpx.post(f"{server.url}/adapters", json={"name": name, "src": name}).raise_for_status()
        yield server


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """The shared server; afterwards it must hold nothing of the test's requests."""
    yield shared_server
    shared_server.wait_until_idle()
    shared_server.check_integrity()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client

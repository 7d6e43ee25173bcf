"""A web server on this machine that behaves as badly as a test asks."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Thing:
    """What is at a path."""

    body: bytes = b""
    etag: str | None = '"1"'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    claims: int | None = None
    """The Content-Length that is said; None: the truth."""
    breaks: list[int] = field(default_factory=list)
    """After how many bytes each of the first GETs is cut off."""
    ranges: bool = True
    on_get: Callable[[], object] = lambda: None
    head: int | None = None
    """The status of a HEAD, if it is another."""
    token: str | None = None
    """Whom it is given to; None: anybody."""


@dataclass
class Asked:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]


class Host:
    """Things by path, and what was asked."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.things: dict[str, Thing] = {}
        self.asked: list[Asked] = []

    def put(self, folder: str, directory: Path) -> None:
        """Offer a directory's files."""
        for path in directory.rglob("*"):
            if path.is_file():
                body = path.read_bytes()
                self.things[f"{folder}/{path.relative_to(directory)}"] = Thing(body, f'"{hash(body)}"')

    def gets(self, path: str) -> list[dict[str, str]]:
        """Return the headers of the GETs of a path."""
        return [each.headers for each in self.asked if (each.method, each.path) == ("GET", path)]


def _answer(host: Host, handler: BaseHTTPRequestHandler) -> None:
    path = handler.path.partition("?")[0]
    headers = {name.lower(): value for name, value in handler.headers.items()}
    host.asked.append(Asked(handler.command, path, headers))
    thing = host.things.get(handler.path) or host.things.get(path) or Thing(status=404)
    if thing.token is not None and headers.get("authorization") != f"Bearer {thing.token}":
        thing = Thing(status=401)
    body, status, more = thing.body, thing.status, dict(thing.headers)
    if handler.command == "HEAD":
        status = thing.head or status
    if handler.command == "GET":
        thing.on_get()
        wanted = headers.get("range", "")
        same = headers.get("if-range") in (None, thing.etag)
        if wanted and thing.ranges and same and status == 200:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            more["content-range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
    if thing.etag is not None:
        more["etag"] = thing.etag
    handler.send_response(status)
    for name, value in more.items():
        handler.send_header(name, value)
    handler.send_header("content-length", str(len(body) if thing.claims is None else thing.claims))
    handler.end_headers()
    if handler.command == "GET":
        cut = thing.breaks.pop(0) if thing.breaks else None
        handler.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            handler.wfile.flush()
            handler.close_connection = True


@contextmanager
def web_host() -> Iterator[Host]:
    """Serve until the block ends."""
    found: list[Host] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(found[0], self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.append(Host(server.server_address[1]))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield found[0]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

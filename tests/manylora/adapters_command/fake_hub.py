"""A model hub as huggingface_hub's client talks to one: repositories, whether they are private, and commits."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(slots=True)
class FakeRepository:
    """One repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=lambda: ["main"])


@dataclass(slots=True)
class FakeHub:
    """What it holds, and whose token it takes."""

    token: str
    url: str = ""
    repositories: dict[str, FakeRepository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        """Return status and JSON."""
        words = path.split("?")[0].strip("/").split("/")
        match method, words:
            case "POST", ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case "GET", ["api", "models", org, name]:
                return self._told(f"{org}/{name}")
            case "POST", ["api", "models", org, name, "branch", branch]:
                self.repositories[f"{org}/{name}"].branches.append(branch)
                return 200, {}
            case "POST", ["api", "models", _, _, "preupload", _]:
                paths = [each["path"] for each in json.loads(body)["files"]]
                modes = ["lfs" if each.endswith(".safetensors") else "regular" for each in paths]
                told = zip(paths, modes, strict=True)
                return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in told]}
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                return 200, {
                    "transfer": "basic",
                    "objects": [self._wanted(e) for e in json.loads(body)["objects"]],
                }
            case "PUT", ["large", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                self.large[oid] = body
                return 200, {}
            case "POST", ["api", "models", org, name, "commit", branch]:
                return self._commit(f"{org}/{name}", branch, body)
        return 404, {"error": f"no {method} {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, object]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "exists", "url": f"{self.url}/{name}"}
        self.repositories[name] = FakeRepository(asked["visibility"] == "private")
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def _told(self, name: str) -> tuple[int, object]:
        found = self.repositories[name]
        return 200, {"id": name, "private": found.private, "sha": "0" * 40, "siblings": [], "tags": []}

    def _wanted(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "actions": {"upload": {"href": f"{self.url}/large/{asked['oid']}"}}}

    def _commit(self, name: str, branch: str, body: bytes) -> tuple[int, object]:
        found = self.repositories[name]
        assert branch in found.branches
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                found.messages.append(value["summary"])
            elif line["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            else:
                found.files[value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1", "success": True}


@contextmanager
def running_hub(token: str) -> Iterator[FakeHub]:
    """Serve a hub until the block ends."""
    hub = FakeHub(token)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, said = 401, {"error": "Invalid credentials"}
            if self.path.startswith("/large/") or self.headers.get("authorization") == f"Bearer {hub.token}":
                status, said = hub.answer(self.command, self.path, body)  # type: ignore[assignment]
            raw = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PUT = _answer  # noqa: N815

        def log_message(self, format: str, *words: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

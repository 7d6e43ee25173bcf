"""Makes one of the directories here with the code of a commit: ``python -m tests.adapters.kept.make COMMIT SCHEMA``.

A server of that commit registers, replaces and deletes adapters and ends; another one goes on from there and is killed;
then a process of that commit's code begins a registration and is killed, too, in its middle. Left out is what comes
back by itself: registry.db-shm, which SQLite makes from the log, the random bytes of registry.db.reserve, and what is
kept of batches and exports.

How they were made: schema 1 by 35925c1, schema 2 by 249547a (0.1.0), schema 3 by b47a9c6, schemas 4 and 5 by
the commits that brought them.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx

from manylora.loadtest.material.checkpoints import AdapterShape, BaseShape, write_adapter, write_base
from manylora.loadtest.material.server_process import START_SECONDS, ServerProcess

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDERS = ("adapters", "demo", "loadtest", "quant", "server", "training")
SHAPE = BaseShape("qwen2", 259, 32, 32, 1, 2, 1, 256)
KEY = "kept"
"""Opens a server of --api-key, which one is where its registry has keys; one without asks for none."""
NAME = "tiny"
"""What the base is served as."""
FLAGS = ("--quantization", "none", "--dtype", "float32", "--kv-cache-gib", "0.02", "--arena-rows", "64")
PROMPT, TOKENS = "tell me", 8

IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from manylora.adapters.registry import AdapterRegistry
try:
    from manylora.adapters.sources.local import operator_source
except ImportError:
    from manylora.adapters.source import operator_source
from manylora.adapters.store import AdapterStore
home, sources = Path(sys.argv[1]), Path(sys.argv[2])
registry = AdapterRegistry(home / "registry.db", reserved=("tiny",))
if hasattr(registry, "mixtures"):
    from manylora.adapters.mixtures import MixturePart
    mixtures = registry.mixtures
    mixtures.create("mixed", [MixturePart("plain", 0.5), MixturePart("team/loaded:v1", -0.25)])
    mixtures.create("mixed-again", [MixturePart("plain", 1.0)])
    mixtures.replace("mixed-again", [MixturePart("plain", 0.0), MixturePart("gone", 2.0)])
    mixtures.create("mixed-no-more", [MixturePart("plain", 1.0)])
    mixtures.retire("mixed-no-more")
if hasattr(registry, "change"):
    registry.change("replaced", lambda found: found.trying(2, 0.25))
if hasattr(registry, "keys"):
    from manylora.adapters.keys import KeyTerms
    limits = dict(requests_per_minute=60, tokens_per_minute=1000, parallel=2, budget=5000, weight=0.5, priority=3)
    record, _ = registry.keys.create(KeyTerms("acme", ("plain", "acme/*", "late@1"), adapter_rows=64, **limits))
    registry.keys.note_spent({record.id: 1234})
    registry.keys.revoke(registry.keys.create(KeyTerms("globex"))[0].id)
store = AdapterStore(home / "adapters")
published = store.publish(store.stage(operator_source(sources / "orphan"))).name
registry.reserve("pending", published, source="orphan", rank=1, targets=("q_proj",), pinned=True)
store.stage(operator_source(sources / "staged"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def write_code(commit: str, place: Path) -> Path:
    """Write the code of ``commit`` below ``place``; return what to import it from."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(place / "code", filter="data")
    package = place / "import" / "manylora"
    shutil.copytree(place / "code" / "manylora", package)
    for folder in FOLDERS:
        (package / folder).symlink_to(place / "code" / folder)
    return package.parent


def write_sources(place: Path, base: Path) -> None:
    """Write the adapters that are registered: each of its own seed."""
    names = ("plain", "pinned", "loaded", "first", "second", "third", "late", "orphan", "staged")
    for seed, name in enumerate(names, 1):
        write_adapter(place / name, base, AdapterShape(rank=1, targets=("q_proj", "down_proj"), seed=seed))


class HasUrl(Protocol):
    """A server, in this process or another."""

    @property
    def url(self) -> str: ...


class Code:
    """The programs of one commit."""

    def __init__(self, place: Path, commit: str) -> None:
        self.place = place
        self.sources = place / "sources"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")}
        self.environment = {**inherited, "PYTHONPATH": str(write_code(commit, place))}

    @contextmanager
    def serving(self) -> Iterator[ServerProcess]:
        """Serve with the data in ``place`` / data until the block ends, by a kill if nothing else ended it."""
        port = 8971
        arguments = [str(HERE / "base"), "--served-model-name", NAME, *FLAGS, "--port", str(port)]
        arguments += ["--data-dir", str(self.place / "data"), "--adapter-root", str(self.sources)]
        log = self.place / "log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "manylora", "serve", *arguments],
                cwd=self.place,
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        server = ServerProcess(f"http://127.0.0.1:{port}", process, log, self.place / "data")
        try:
            server.wait_until_ready(START_SECONDS)
            yield server
        finally:
            server.kill()

    @property
    def home(self) -> Path:
        """Where the base's registry and files are."""
        (registry,) = (self.place / "data").glob("*/registry.db")
        return registry.parent

    def stop_in_the_middle(self) -> None:
        """Begin a registration and be killed."""
        command = [sys.executable, "-c", IN_THE_MIDDLE, str(self.home), str(self.sources)]
        ended = subprocess.run(command, cwd=self.place, env=self.environment, check=False)
        assert ended.returncode == -9, ended.returncode


def call(server: HasUrl, method: str, path: str, **body: object) -> Any:
    """Send a request that must succeed; return the answer."""
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.request(method, f"{server.url}{path}", json=body or None, headers=headers, timeout=60)
    assert answer.is_success, answer.text
    return answer.json()


def first_life(server: ServerProcess) -> None:
    """Register, replace and delete; what is there is in the database itself when this server has ended."""
    call(server, "POST", "/adapters", name="plain", src="plain")
    call(server, "POST", "/adapters", name="same-weights", src="plain")
    call(server, "POST", "/adapters", name="pinned", src="pinned", pin=True)
    call(server, "POST", "/adapters", name="team/loaded:v1", src="loaded", preload=True)
    call(server, "POST", "/adapters", name="replaced", src="first")
    call(server, "PUT", "/adapters/replaced", src="second")
    call(server, "POST", "/adapters", name="again", src="first")
    call(server, "POST", "/adapters", name="deleted", src="second")
    call(server, "DELETE", "/adapters/deleted")
    call(server, "DELETE", "/adapters/again")


def second_life(server: ServerProcess) -> None:
    """Go on; what changes is in the log when this server is killed."""
    call(server, "POST", "/adapters", name="again", src="third")
    call(server, "PUT", "/adapters/replaced", src="third", pin=True)
    call(server, "POST", "/adapters", name="late", src="late")
    call(server, "DELETE", "/adapters/same-weights")


ASKER = "reader"
"""Whose requests for a name with a canary stay with its active version."""


def said(server: HasUrl) -> dict[str, Any]:
    """Return the adapters with what is kept of them, and what the base and they answer: tokens, each with its logprob.

    As text these are noise that isn't UTF-8; the logprobs tell one adapter from another.
    """
    shown = {each["name"]: each for each in call(server, "GET", "/adapters")["data"] if "digest" in each}
    kept = ("id", "version", "digest", "src", "rank", "target_modules", "preload", "pin", "created")
    answers = {}
    for model in (NAME, *shown):
        asked = {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": 1,
            "user": ASKER,
        }
        found = call(server, "POST", "/v1/completions", **asked)["choices"][0]["logprobs"]
        answers[model] = [*zip(found["tokens"], found["token_logprobs"], strict=True)]
    adapters = {name: {field: each[field] for field in kept} for name, each in shown.items()}
    return {"adapters": adapters, "answers": answers}


def main(commit: str, schema: str) -> None:
    """Make schema-``schema`` and its json here, and the base if it isn't there."""
    if not (HERE / "base").exists():
        write_base(HERE / "base", SHAPE)
    target = HERE / f"schema-{schema}"
    with tempfile.TemporaryDirectory() as room:
        code = Code(Path(room), commit)
        write_sources(code.sources, HERE / "base")
        with code.serving() as server:
            first_life(server)
            server.end()
        with code.serving() as server:
            second_life(server)
            told = said(server)
        code.stop_in_the_middle()
        shutil.rmtree(target, ignore_errors=True)
        left_out = shutil.ignore_patterns("registry.db-shm", "registry.db.reserve", "batches", "exports")
        shutil.copytree(code.home, target / code.home.name, ignore=left_out)
    (HERE / f"schema-{schema}.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

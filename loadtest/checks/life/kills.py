"""A true server that is killed while adapters' lives are changed over HTTP: what was acknowledged is there again.

Its processes are forked from one that has imported everything: a start takes a part of a second.
"""

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from manylora.adapters.fsck.check import check
from manylora.adapters.names import with_version
from manylora.adapters.pairing import REGISTRY_FILE
from manylora.loadtest.checks.bars.material import TARGETS, Material
from manylora.loadtest.checks.bars.walk_house import RANKS
from manylora.loadtest.checks.life.operations import Operation, draw
from manylora.loadtest.checks.life.truth import Refused, Truth, must
from manylora.loadtest.material.server_process import START_SECONDS, environment_of_children, free_port

LONGEST_LIFE = 0.8
"""Seconds of changes after which a server is killed, at most."""
ASK: dict[str, object] = {"prompt": [5, 6, 7, 8], "max_tokens": 4, "temperature": 0, "logprobs": 1}
NURSERY = """
import json, os, signal, sys
import manylora.cli, manylora.serve, manylora.assemble, uvicorn
for line in sys.stdin:
    asked = json.loads(line)
    if "kill" in asked:
        os.kill(asked["kill"], signal.SIGKILL)
        os.waitpid(asked["kill"], 0)
        print("gone", flush=True)
        continue
    child = os.fork()
    if child == 0:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1), os.dup2(log, 2), os.close(0)
        sys.argv = ["manylora", *asked["arguments"]]
        os._exit(manylora.cli.main() or 0)
    print(child, flush=True)
"""


@dataclass(slots=True)
class Nursery:
    """Starts servers on one data directory, and kills them."""

    process: "subprocess.Popen[str]"
    arguments: list[str]
    log: Path
    pid: int = 0
    url: str = ""

    def start(self) -> None:
        """Start one, and return when it answers. Raises RuntimeError if it never does."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.pid = int(self._ask({"arguments": [*self.arguments, "--port", str(port)], "log": str(self.log)}))
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.01)
        raise RuntimeError(f"the server did not become ready:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.pid:
            self._ask({"kill": self.pid})
            self.pid = 0

    def _ask(self, what: dict[str, object]) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


@contextmanager
def nursery(arguments: list[str], log: Path) -> Iterator[Nursery]:
    """Give one; its server ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment_of_children(),
    )
    found = Nursery(process, arguments, log)
    try:
        yield found
    finally:
        found.kill()
        process.communicate()


@dataclass(slots=True)
class Killing:
    """One run. Raises Diverged at the first thing that is lost, or there and never was."""

    servers: Nursery
    sources: tuple[str, ...]
    rng: random.Random
    truth: Truth
    data: Path
    """The servers' data directory."""
    counts: Counter[str] = field(default_factory=Counter)
    answers: dict[str, object] = field(default_factory=dict)
    """What each source answers."""
    under_way: Operation | None = None
    """What was asked for, and not answered when the server was killed."""

    def go(self, kills: int) -> None:
        """Kill so many servers."""
        self.servers.start()
        for _ in range(kills):
            killer = threading.Timer(self.rng.uniform(0, LONGEST_LIFE), self.servers.kill)
            killer.start()
            self._change_until_killed()
            killer.join()
            self.counts["kills"] += 1
            self.counts["kills in a change"] += self.under_way is not None
            self._check_files("fault")
            self.servers.start()
            self._hold()
        # What the last kill left is swept by the start, too.
        self.servers.kill()
        self._check_files("fault", "leftover")

    def _check_files(self, *levels: str) -> None:
        """Hold registry and stored files against each other, now that no server runs."""
        for registry in self.data.glob(f"*/{REGISTRY_FILE}"):
            wrong = [each for each in check(registry.parent).findings if each.level in levels]
            must(not wrong, f"the data directory isn't sound: {wrong}")

    def _change_until_killed(self) -> None:
        with httpx.Client(base_url=self.servers.url, timeout=60) as http:
            while True:
                operation = _over_http(draw(self.rng, self.truth, self.sources), self.truth)
                self.under_way = operation
                method, path, body = operation.request(self.truth)
                try:
                    answer = http.request(method, path, json=body)
                except httpx.TransportError:
                    return
                self.under_way = None
                self.counts["acknowledged"] += 1
                try:
                    wanted, status = operation.done_to(self.truth), 200
                except Refused as refused:
                    wanted, status = self.truth, refused.status
                # That something new was made makes no difference here.
                got = 200 if answer.is_success else answer.status_code
                must(got == status, f"{operation}: {answer.status_code} {answer.text}, {status} was due")
                self.truth = wanted

    def _hold(self) -> None:
        """Hold what a server that started again says against what was acknowledged."""
        may = [self.truth]
        if self.under_way is not None:
            with suppress(Refused):
                may.append(self.under_way.done_to(self.truth))
        with httpx.Client(base_url=self.servers.url, timeout=60) as http:
            found = _found(http)
            right = next((each for each in may if _told(each) == found), None)
            must(right is not None, f"after {self.under_way}: {found}, not {[_told(each) for each in may]}")
            self.truth, self.under_way = right or self.truth, None
            self._hold_answers(http)

    def _hold_answers(self, http: httpx.Client) -> None:
        """Every version answers what its source always answered; mixtures do, or say why they can't."""
        for name, versions in self.truth.names.items():
            for version, source in versions.sources.items():
                model = with_version(name, version)
                answer = http.post("/v1/completions", json={**ASK, "model": model})
                must(answer.status_code == 200, f"{model}: {answer.text}")
                must(answer.headers["x-manylora-adapter"] == model, f"{model} was answered by another")
                told = answer.json()["choices"][0]["logprobs"]["tokens"], answer.json()["choices"][0]["text"]
                must(self.answers.setdefault(source, told) == told, f"{model} answers {told}")
        for name, parts in self.truth.mixtures.items():
            try:
                status, _ = 200, self.truth.meaning(parts)
            except Refused:
                status = 503
            answer = http.post("/v1/completions", json={**ASK, "model": name})
            must(answer.status_code == status, f"{name}: {answer.status_code} {answer.text}")


def _over_http(operation: Operation, truth: Truth) -> Operation:
    """Return what is done by the same route: what a DELETE deletes is found by its name."""
    if operation.kind in ("delete", "unmix"):
        return replace(operation, kind="unmix" if operation.name in truth.mixtures else "delete")
    return operation


def _found(http: httpx.Client) -> object:
    names, mixtures = {}, {}
    for each in http.get("/adapters").raise_for_status().json()["data"]:
        if each["object"] == "mixture":
            mixtures[each["name"]] = tuple((part["adapter"], part["weight"]) for part in each["mixture"])
            continue
        told: dict[str, Any] = http.get(f"/adapters/{each['name']}/versions").raise_for_status().json()
        canary = told["canary"] and (told["canary"]["version"], told["canary"]["share"])
        sources = {version["version"]: version["src"] for version in told["data"]}
        names[each["name"]] = (told["active"], sources, canary)
    return names, mixtures


def _told(truth: Truth) -> object:
    names = {
        name: (found.active, found.sources, None if found.canary is None else (found.canary, found.share))
        for name, found in truth.names.items()
    }
    return names, truth.mixtures


def kill_servers(directory: Path, kills: int, seed: int) -> Counter[str]:
    """Kill so many servers of a small base below ``directory``; return how often what was done."""
    material = Material.make(directory)
    sources = tuple(
        material.adapter(number, rank, TARGETS[number % len(TARGETS)]) for number, rank in enumerate(RANKS)
    )
    arguments = ["serve", str(material.base), "--data-dir", str(directory / "data"), *material.arguments()]
    with nursery(arguments, directory / "log") as servers:
        killing = Killing(servers, sources, random.Random(seed), Truth(keep=2), directory / "data")
        killing.go(kills)
    return killing.counts

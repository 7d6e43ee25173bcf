"""`python -m manylora.loadtest.checks.tenants`: two tenants on one server, and neither sees anything of the other.

Random requests with either's keys and names of both go to every route, and each answer is held against a model of what
its caller may see: which status it has, which names a list holds, and that no answer tells a name of the other's that
its request didn't. Then 64 streams at once push against a key's limits, and a server is killed again and again while a
budget is spent: what was answered must still be spent after each start. Exits 1 if anything was wrong.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from manylora.loadtest.material.checkpoints import TINY, AdapterShape, write_adapter, write_base
from manylora.loadtest.material.server_process import ServerProcess, running, start_server

ADMIN = "the-admin-key-of-the-check"
BASE = "base"
TENANTS = ("acme", "globex")
SHARED = ("shared-one", "shared-two")
STREAMS, PLACES = 64, 8
ANSWER_SECONDS = 120.0
FLAGS = ("--quantization", "none", "--dtype", "float32", "--kv-cache-gib", "0.05", "--arena-rows", "128")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is asked."""

    requests: int = 10_000
    kills: int = 10
    spent_between: int = 40
    """Requests until a kill, at most."""
    seed: int = 1


@dataclass(slots=True)
class Tenant:
    """What one tenant has, as the model knows it."""

    name: str
    key: str
    adapters: set[str] = field(default_factory=set)
    mixtures: dict[str, tuple[str, ...]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    batches: set[str] = field(default_factory=set)

    @property
    def secrets(self) -> set[str]:
        """What nobody else is to be told of."""
        return self.own | self.files | self.batches | {self.key}

    @property
    def own(self) -> set[str]:
        """Everything in its namespace."""
        return self.adapters | set(self.mixtures)

    @property
    def visible(self) -> set[str]:
        """What it may ask: a mixture as long as its parts are there."""
        whole = {name for name, parts in self.mixtures.items() if self.adapters.union(SHARED) >= set(parts)}
        return {BASE, *SHARED, *self.adapters, *whole}


class Walk:
    """Random requests of two tenants, each with what its answer must be."""

    def __init__(self, client: httpx.Client, tenants: list[Tenant], seed: int) -> None:
        self._client = client
        self._tenants = tenants
        self._dice = random.Random(seed)
        self.wrong: list[str] = []
        self.asked = 0

    def step(self) -> None:
        """Send one request and look at its answer."""
        me, other = self._dice.sample(self._tenants, 2)
        kinds: list[Callable[[Tenant, Tenant], None]] = [
            *(self._ask, self._ask, self._ask, self._list, self._describe),
            *(
                self._register,
                self._register,
                self._mix,
                self._replace,
                self._delete,
                self._look,
                self._forbidden,
            ),
        ]
        self.asked += 1
        self._dice.choice(kinds)(me, other)

    def _name(self, me: Tenant, other: Tenant) -> str:
        """Return a name: mine, the other's, everybody's, nobody's."""
        pools = [sorted(me.own), sorted(other.own), [*SHARED, BASE]]
        nobodys = [f"{tenant.name}/{self._word()}" for tenant in (me, other)] + [self._word()]
        return self._dice.choice(self._dice.choice([pool for pool in pools if pool] + [nobodys]))

    def _word(self) -> str:
        return "".join(self._dice.choices("bcdfghjkl", k=10))

    def _send(
        self, me: Tenant, other: Tenant, method: str, path: str, body: Any = None, **more: Any
    ) -> httpx.Response:
        head = {"authorization": f"Bearer {me.key}"}
        answer = self._client.request(method, path, json=body, headers=head, **more)
        said = f"{path} {body}"
        told = answer.text + str(answer.headers)
        for name in other.secrets:
            if name not in said and name in told:
                self._fault(f"{me.name}: {method} {said} tells {name}: {told[:300]}")
        if answer.status_code >= 500:
            self._fault(f"{method} {said}: {answer.status_code} {answer.text[:300]}")
        return answer

    def _expect(self, answer: httpx.Response, statuses: set[int], what: str) -> None:
        if answer.status_code not in statuses:
            self._fault(f"{what}: {answer.status_code}, not {sorted(statuses)}: {answer.text[:300]}")

    def _fault(self, what: str) -> None:
        self.wrong.append(what)

    def _ask(self, me: Tenant, other: Tenant) -> None:
        names = [self._name(me, other) for _ in range(self._dice.choice((1, 1, 1, 2)))]
        model = "+".join(names)
        routes: dict[str, dict[str, object]] = {
            "/v1/completions": {"prompt": "hello", "max_tokens": 1},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
            "/tokenize": {"prompt": "x"},
            "/detokenize": {"tokens": [5]},
            "/v1/embeddings": {"input": "x"},
        }
        route = self._dice.choice(sorted(routes))
        body = {"model": model, **routes[route]}
        if route.endswith("completions"):
            body["stream"] = self._dice.random() < 0.3
        answer = self._send(me, other, "POST", route, body)
        fine = set(names) <= me.visible if len(names) == 1 else set(names) <= (me.adapters | set(SHARED))
        # A mixture of what is there may still make no sense: a part twice, the base, a mixture.
        may = {200} if fine and len(set(names)) == len(names) else {400, 404}
        if len(names) > 1 and not set(names) <= me.visible:
            may = {400, 404}
        self._expect(answer, may, f"{me.name} asks {route} of {model}")

    def _list(self, me: Tenant, other: Tenant) -> None:
        answer = self._send(me, other, "GET", "/v1/models")
        found = {each["id"] for each in answer.json()["data"]}
        if found != me.visible:
            self._fault(f"{me.name} sees {sorted(found)}, not {sorted(me.visible)}")

    def _describe(self, me: Tenant, other: Tenant) -> None:
        name = self._name(me, other)
        answer = self._send(me, other, "GET", f"/v1/models/{name}")
        self._expect(answer, {200 if name in me.visible else 404}, f"{me.name} describes {name}")

    def _look(self, me: Tenant, other: Tenant) -> None:
        if self._dice.random() < 0.5:
            answer = self._send(me, other, "GET", "/adapters")
            found = {each["name"] for each in answer.json()["data"]}
            if not found <= me.own or not found >= me.own & me.visible:
                self._fault(f"{me.name} manages {sorted(found)}, not {sorted(me.own)}")
            return
        name = self._name(me, other)
        answer = self._send(me, other, "GET", f"/adapters/{name}")
        there = {200} if name in me.own & me.visible else {404} if name not in me.own else {200, 404}
        self._expect(answer, there, f"{me.name} looks at {name}")

    def _register(self, me: Tenant, other: Tenant) -> None:
        name = self._name(me, other)
        source = self._dice.choice(("one", "two", f"../{other.name}/one", "nothing"))
        answer = self._send(me, other, "POST", "/adapters", {"name": name, "src": source})
        if not name.startswith(f"{me.name}/"):
            self._expect(answer, {403}, f"{me.name} registers {name}")
        elif source not in ("one", "two"):
            self._expect(answer, {400, 403, 409}, f"{me.name} registers {name} from {source}")
        else:
            self._expect(answer, {200, 201, 409}, f"{me.name} registers {name}")
            if answer.is_success:
                me.adapters.add(name)

    def _mix(self, me: Tenant, other: Tenant) -> None:
        name, parts = self._name(me, other), [self._name(me, other) for _ in range(2)]
        mixture = [{"adapter": part} for part in parts]
        answer = self._send(me, other, "POST", "/adapters", {"name": name, "mixture": mixture})
        if not name.startswith(f"{me.name}/"):
            self._expect(answer, {403}, f"{me.name} mixes {name}")
        elif not set(parts) <= me.visible:
            self._expect(answer, {400, 404, 409}, f"{me.name} mixes {parts}")
        elif answer.is_success:
            me.mixtures[name] = tuple(parts)

    def _replace(self, me: Tenant, other: Tenant) -> None:
        name = self._name(me, other)
        answer = self._send(me, other, "PUT", f"/adapters/{name}", {"src": self._dice.choice(("one", "two"))})
        right = {200} if name in me.adapters else {409, 404} if name in me.mixtures else {404}
        self._expect(answer, right, f"{me.name} replaces {name}")

    def _delete(self, me: Tenant, other: Tenant) -> None:
        name = self._name(me, other)
        answer = self._send(me, other, "DELETE", f"/adapters/{name}")
        gone = {200} if name in me.own & me.visible else {200, 404} if name in me.own else {404}
        self._expect(answer, gone, f"{me.name} deletes {name}")
        if answer.is_success:
            me.adapters.discard(name)
            me.mixtures.pop(name, None)

    def _upload(self, me: Tenant, other: Tenant) -> None:
        body = {"model": self._name(me, other), "prompt": "x", "max_tokens": 1}
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
        form: dict[str, Any] = {
            "files": {"file": ("lines.jsonl", json.dumps(line).encode())},
            "data": {"purpose": "batch"},
        }
        answer = self._client.post("/v1/files", headers={"authorization": f"Bearer {me.key}"}, **form)
        self._expect(answer, {200}, f"{me.name} uploads a file")
        me.files.add(answer.json()["id"])

    def _files(self, me: Tenant, other: Tenant) -> None:
        if not me.files | other.files or self._dice.random() < 0.3:
            found = self._send(me, other, "GET", "/v1/files", params={"limit": 10_000}).json()["data"]
            if not {each["id"] for each in found} >= me.files:
                self._fault(f"{me.name} misses files of its own")
            return
        name = self._dice.choice(sorted(me.files | other.files))
        method, end = self._dice.choice((("GET", ""), ("GET", "/content"), ("DELETE", "")))
        answer = self._send(me, other, method, f"/v1/files/{name}{end}")
        right = {200} if name in me.files else {404}
        self._expect(answer, right, f"{me.name}: {method} a file{end}")
        if method == "DELETE" and answer.is_success:
            me.files.discard(name)

    def _batches(self, me: Tenant, other: Tenant) -> None:
        pool = sorted(me.files | other.files)
        if pool and self._dice.random() < 0.3:
            name = self._dice.choice(pool)
            body = {"input_file_id": name, "endpoint": "/v1/completions", "completion_window": "24h"}
            answer = self._send(me, other, "POST", "/v1/batches", body)
            self._expect(answer, {200, 429} if name in me.files else {404}, f"{me.name} begins a batch")
            if answer.is_success:
                me.batches.add(answer.json()["id"])
        found = self._send(me, other, "GET", "/v1/batches", params={"limit": 100}).json()["data"]
        if len(me.batches) <= 100 and {each["id"] for each in found} != me.batches:
            self._fault(f"{me.name} sees batches that aren't its own, or misses some")
        for name in self._dice.sample(sorted(other.batches), min(1, len(other.batches))):
            self._expect(
                self._send(me, other, "GET", f"/v1/batches/{name}"), {404}, f"{me.name} looks at a batch"
            )
            cancelled = self._send(me, other, "POST", f"/v1/batches/{name}/cancel", {})
            self._expect(cancelled, {404}, f"{me.name} cancels a batch")

    def _forbidden(self, me: Tenant, other: Tenant) -> None:
        method, path = self._dice.choice(
            [("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/exports"), ("GET", "/metrics")]
        )
        answer = self._send(me, other, method, path, {"tenant": other.name} if method == "POST" else None)
        self._expect(answer, {200 if path == "/metrics" else 403}, f"{me.name} calls {path}")


def new_key(url: str, tenant: str, **terms: object) -> str:
    """Return the secret of a new key."""
    head = {"authorization": f"Bearer {ADMIN}"}
    made = httpx.post(f"{url}/admin/keys", json={"tenant": tenant, **terms}, headers=head, timeout=60)
    made.raise_for_status()
    secret: str = made.json()["key"]
    return secret


def walk(url: str, sizes: Sizes) -> list[str]:
    """Let two tenants send random requests; return what was wrong."""
    head = {"authorization": f"Bearer {ADMIN}"}
    for name, source in zip(SHARED, ("one", "two"), strict=True):
        body = {"name": name, "src": f"acme/{source}"}
        httpx.post(f"{url}/adapters", json=body, headers=head, timeout=60).raise_for_status()
    tenants = [Tenant(name, new_key(url, name, rights=["infer", "manage"])) for name in TENANTS]
    with httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client:
        house = Walk(client, tenants, sizes.seed)
        for _ in range(sizes.requests):
            house.step()
    return house.wrong


def stream_at_once(url: str) -> list[str]:
    """Send 64 streams at once with keys that allow fewer; return what was wrong."""
    wrong = []
    body = {"model": BASE, "prompt": "hello", "max_tokens": 64, "ignore_eos": True, "stream": True}

    def send(key: str) -> int:
        head = {"authorization": f"Bearer {key}"}
        return client.post("/v1/completions", json=body, headers=head).status_code

    tokens = _tokens(url, body)
    kinds: dict[str, tuple[dict[str, object], int]] = {
        "requests a minute": ({"requests_per_minute": PLACES}, PLACES),
        "tokens a minute": ({"tokens_per_minute": PLACES * tokens}, PLACES),
        "a budget": ({"budget": PLACES * tokens}, PLACES),
    }
    together = httpx.Limits(max_connections=STREAMS)
    with (
        httpx.Client(base_url=url, limits=together, timeout=ANSWER_SECONDS) as client,
        ThreadPoolExecutor(STREAMS) as threads,
    ):
        for what, (terms, most) in kinds.items():
            key, begun = new_key(url, "acme", **terms), time.monotonic()
            statuses = list(threads.map(send, [key] * STREAMS))
            minutes = 1 if what == "a budget" else 1 + int((time.monotonic() - begun) / 60)
            let_in = statuses.count(200)
            if not most <= let_in <= most * minutes or statuses.count(429) != STREAMS - let_in:
                wrong.append(f"{what}: {let_in} of {STREAMS} streams were let in, not {most}")
    return wrong


def _tokens(url: str, body: dict[str, Any]) -> int:
    """Return what one of these streams uses."""
    head = {"authorization": f"Bearer {new_key(url, 'acme')}"}
    whole = {**body, "stream": False}
    answer = httpx.post(f"{url}/v1/completions", json=whole, headers=head, timeout=ANSWER_SECONDS)
    return int(answer.json()["usage"]["total_tokens"])


def spend_and_kill(start: Callable[[], ServerProcess], sizes: Sizes) -> list[str]:
    """Spend a budget on servers that are killed; return what was wrong."""
    dice, wrong, answered, key = random.Random(sizes.seed), [], 0, ""
    budget = 64 * (sizes.kills + 2) * max(64, sizes.spent_between)
    head = {"authorization": f"Bearer {ADMIN}"}
    for number in range(sizes.kills + 1):
        server = start()
        try:
            server.wait_until_ready()
            key = key or new_key(server.url, "spender", budget=budget)
            keys = httpx.get(f"{server.url}/admin/keys", headers=head, timeout=60).json()["data"]
            (used,) = [each["used"] for each in keys if each["tenant"] == "spender"]
            if not answered <= used <= budget:
                wrong.append(f"after {number} kills {used} tokens are spent, and {answered} were answered")
            for _ in range(dice.randint(1, sizes.spent_between)):
                body = {"model": BASE, "prompt": "hello", "max_tokens": dice.randint(1, 16)}
                own = {"authorization": f"Bearer {key}"}
                answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=own, timeout=60)
                answer.raise_for_status()
                answered += answer.json()["usage"]["total_tokens"]
        finally:
            server.kill()
    return wrong


def write_files(root: Path) -> None:
    """Write a base, and two adapters in a folder of each tenant."""
    base = write_base(root / "base", TINY)
    for tenant in TENANTS:
        for number, name in enumerate(("one", "two")):
            shape = AdapterShape(rank=4 << number, seed=number)
            write_adapter(root / "adapters" / tenant / name, base, shape)


def check(sizes: Sizes) -> dict[str, list[str]]:
    """Return what was wrong with each of the promises."""
    with tempfile.TemporaryDirectory() as room:
        root = Path(room)
        write_files(root)
        folder = str(root / "adapters")
        flags = (*FLAGS, "--admin-key", ADMIN, "--served-model-name", BASE, "--adapter-root", folder)

        def start(data: str) -> ServerProcess:
            return start_server(root / "base", root / data, flags)

        found: dict[str, list[str]] = {}
        with running(server := start("walked")):
            found[f"{sizes.requests} requests of two tenants"] = walk(server.url, sizes)
            found[f"{STREAMS} streams at once"] = stream_at_once(server.url)
        found[f"{sizes.kills} kills"] = spend_and_kill(lambda: start("killed"), sizes)
        return found


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    usual = Sizes()
    parser.add_argument("--requests", type=int, default=usual.requests)
    parser.add_argument("--kills", type=int, default=usual.kills)
    parser.add_argument("--seed", type=int, default=usual.seed)
    given = parser.parse_args()
    found = check(Sizes(given.requests, given.kills, seed=given.seed))
    for promise, wrong in found.items():
        print(f"{promise}: {'kept' if not wrong else f'{len(wrong)} faults'}")  # noqa: T201
        for fault in wrong[:20]:
            print(f"  {fault}")  # noqa: T201
    sys.exit(1 if any(found.values()) else 0)


if __name__ == "__main__":
    main()

"""Random requests of two tenants with each other's names, each answer held against what its caller may see."""

import json
import random
from collections.abc import Callable
from typing import Any

import httpx

from manylora.loadtest.checks.tenants_house import (
    ADMIN,
    ANSWER_SECONDS,
    BASE,
    SHARED,
    TENANTS,
    Tenant,
    new_key,
)


class Walk:
    """Random requests of two tenants, each with what its answer must be."""

    def __init__(self, client: httpx.Client, tenants: list[Tenant], seed: int) -> None:
        self._client = client
        self._tenants = tenants
        self._dice = random.Random(seed)
        self.wrong: list[str] = []
        self.asked = 0
        self._results: set[str] = set()

    def step(self) -> None:
        """Send one request and look at its answer."""
        me, other = self._dice.sample(self._tenants, 2)
        kinds: list[Callable[[Tenant, Tenant], None]] = [
            *(self._ask, self._ask, self._ask, self._list, self._describe),
            *(self._register, self._register, self._mix, self._replace, self._delete),
            *(self._look, self._forbidden, self._upload, self._files, self._batches, self._begin),
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
        self,
        me: Tenant,
        other: Tenant,
        method: str,
        path: str,
        body: Any = None,
        written: str = "",
        **more: Any,
    ) -> httpx.Response:
        """Send a request; ``written``: what else the caller said, and may be told again."""
        head = {"authorization": f"Bearer {me.key}"}
        answer = self._client.request(method, path, json=body, headers=head, **more)
        said = f"{path} {body} {written}"
        told = answer.text + str(answer.headers)
        for name in other.secrets:
            if name not in said and name in told:
                self._fault(f"{me.name}: {method} {said} tells {name}: {told[:300]}")
        is_broken = answer.status_code == 503 and any(name in said for name in me.broken)
        if answer.status_code >= 500 and not is_broken:
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
            "/v1/score": {"text_1": "x", "text_2": "y"},
            "/v1/rerank": {"query": "x", "documents": ["y"]},
            "/v1/responses": {"input": "x", "max_output_tokens": 16},
            "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
            "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
        }
        route = self._dice.choice(sorted(routes))
        body = {"model": model, **routes[route]}
        if route.endswith(("completions", "responses", "messages")):
            body["stream"] = self._dice.random() < 0.3
        answer = self._send(me, other, "POST", route, body)
        fine = set(names) <= me.visible if len(names) == 1 else set(names) <= (me.adapters | set(SHARED))
        # A mixture of what is there may still make no sense: a part twice, the base, a mixture.
        may = {200} if fine and len(set(names)) == len(names) else {400, 404}
        if len(names) > 1 and not set(names) <= me.visible:
            may = {400, 404}
        if len(names) == 1 and set(names) <= me.broken:
            may = {503}
        self._expect(answer, may, f"{me.name} asks {route} of {model}")

    def _list(self, me: Tenant, other: Tenant) -> None:
        answer = self._send(me, other, "GET", "/v1/models")
        found = {each["id"] for each in answer.json()["data"]}
        if found != me.visible:
            self._fault(f"{me.name} sees {sorted(found)}, not {sorted(me.visible)}")

    def _describe(self, me: Tenant, other: Tenant) -> None:
        name = self._name(me, other)
        answer = self._send(me, other, "GET", f"/v1/models/{name}")
        right = 200 if name in me.visible else 503 if name in me.broken else 404
        self._expect(answer, {right}, f"{me.name} describes {name}")

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
        line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})
        form: dict[str, Any] = {
            "files": {"file": ("lines.jsonl", line.encode())},
            "data": {"purpose": "batch"},
        }
        answer = self._client.post("/v1/files", headers={"authorization": f"Bearer {me.key}"}, **form)
        self._expect(answer, {200}, f"{me.name} uploads a file")
        me.files[answer.json()["id"]] = line

    def _files(self, me: Tenant, other: Tenant) -> None:
        ids = sorted([*me.files, *other.files])
        if not ids or self._dice.random() < 0.3:
            listed = self._send(me, other, "GET", "/v1/files", params={"limit": 10_000}).json()["data"]
            found = {each["id"] for each in listed}
            if not found >= set(me.files) or found & set(other.files):
                self._fault(f"{me.name} lists {len(found)} files: not all of its own, or another's")
            return
        name = self._dice.choice(ids)
        method, end = self._dice.choice((("GET", ""), ("GET", "/content"), ("DELETE", "")))
        answer = self._send(me, other, method, f"/v1/files/{name}{end}", written=me.files.get(name, ""))
        self._expect(answer, {200 if name in me.files else 404}, f"{me.name}: {method} a file{end}")
        if end and answer.is_success and (model := _model_of_result(answer.text)) is not None:
            name, status = model
            if name.startswith(f"{other.name}/") and status != 404:
                self._fault(f"{me.name}'s batch was answered {status} by {name}")
        if method == "DELETE" and answer.is_success:
            del me.files[name]

    def _begin(self, me: Tenant, other: Tenant) -> None:
        if not (ids := sorted([*me.files, *other.files])):
            return
        name = self._dice.choice(ids)
        body = {"input_file_id": name, "endpoint": "/v1/completions", "completion_window": "24h"}
        answer = self._send(me, other, "POST", "/v1/batches", body)
        # A batch's result is a file too, and none that a batch may read.
        self._expect(answer, {200, 400, 429} if name in me.files else {400}, f"{me.name} begins a batch")
        if answer.is_success:
            me.batches[answer.json()["id"]] = me.files[name]

    def _batches(self, me: Tenant, other: Tenant) -> None:
        # Each names the model of its first line, as its tenant wrote it.
        written = " ".join(me.batches.values())
        answer = self._send(me, other, "GET", "/v1/batches?limit=100", written=written)
        found = answer.json()["data"]
        ids = {each["id"] for each in found}
        if not ids <= set(me.batches) or len(ids) != min(100, len(me.batches)):
            self._fault(f"{me.name} sees batches that aren't its own, or misses some")
        for each in found[:5]:
            for made in (each.get("output_file_id"), each.get("error_file_id")):
                # What was seen once may have been deleted since.
                if made is not None and made not in self._results:
                    self._results.add(made)
                    me.files[made] = me.batches[each["id"]]
        for name in self._dice.sample(sorted(other.batches), min(1, len(other.batches))):
            looked = self._send(me, other, "GET", f"/v1/batches/{name}")
            self._expect(looked, {404}, f"{me.name} looks at a batch")
            cancelled = self._send(me, other, "POST", f"/v1/batches/{name}/cancel", {})
            self._expect(cancelled, {404}, f"{me.name} cancels a batch")
            beyond = self._send(me, other, "GET", f"/v1/batches?after={name}")
            self._expect(beyond, {404}, f"{me.name} lists what comes after another's batch")

    def _forbidden(self, me: Tenant, other: Tenant) -> None:
        key = self._dice.choice((me.key_id, other.key_id, f"key-{self._word()}"))
        method, path = self._dice.choice(
            [
                *(("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", f"/admin/keys/{key}")),
                *(("DELETE", f"/admin/keys/{key}"), ("POST", f"/admin/keys/{key}/rotate")),
                *(("GET", "/exports"), ("GET", "/metrics")),
            ]
        )
        answer = self._send(me, other, method, path, {"tenant": other.name} if method == "POST" else None)
        self._expect(answer, {200 if path == "/metrics" else 403}, f"{me.name} calls {path}")


def _model_of_result(text: str) -> tuple[str, int] | None:
    """Return which model a batch's result of one line is of, and its status; None: it is no result."""
    line = json.loads(text)
    if "response" not in line:
        return None
    body = line["response"]["body"]
    told = body.get("model") or body["error"]["message"].partition("'")[2].partition("'")[0]
    return str(told), int(line["response"]["status_code"])


def walk(url: str, requests: int, seed: int) -> list[str]:
    """Let two tenants send so many random requests; return what was wrong."""
    head = {"authorization": f"Bearer {ADMIN}"}
    for name, source in zip(SHARED, ("one", "two"), strict=True):
        body = {"name": name, "src": f"acme/{source}"}
        httpx.post(f"{url}/adapters", json=body, headers=head, timeout=60).raise_for_status()
    tenants = [Tenant(name, *new_key(url, name, rights=["infer", "manage"])) for name in TENANTS]
    with httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client:
        house = Walk(client, tenants, seed)
        for _ in range(requests):
            house.step()
    return house.wrong

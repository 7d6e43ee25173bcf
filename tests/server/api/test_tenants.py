"""Two tenants on one server: what each sees and may change, and that it is told of nothing else."""

import json
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from manylora.adapters.keys import KeyTerms
from manylora.adapters.registry import AdapterRegistry
from tests.server.api.running import BASE, Files, Running, running
from tests.server.api.tenants import ADMIN, call, complete, error, names, new_key, write_folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants")


@pytest.fixture(scope="module")
def house(files: Files, data: Path) -> Iterator[Running]:
    """Adapters a and b of nobody, acme/x, globex/secret, and a mixture of a and globex's."""
    write_folders(files)
    with running(files, data, admin_key=ADMIN) as server:
        for name, src in (("a", "a"), ("b", "b"), ("acme/x", "acme/x"), ("globex/secret", "globex/secret")):
            assert call(server, "POST", "/adapters", ADMIN, {"name": name, "src": src}).status_code == 201
        parts = [{"adapter": "a"}, {"adapter": "globex/secret"}]
        mixed = {"name": "blend", "mixture": parts}
        assert call(server, "POST", "/adapters", ADMIN, mixed).status_code == 201
        new_key(server, "globex")
        yield server


def registry_of(data: Path) -> Path:
    (found,) = data.glob("*/registry.db")
    return found


def test_a_secret_is_told_once_and_kept_nowhere(house: Running, data: Path) -> None:
    made = call(house, "POST", "/admin/keys", ADMIN, {"tenant": "acme", "budget": 100})
    secret, key_id = made.json()["key"], made.json()["id"]
    assert secret.startswith("mlk_")
    assert made.headers["cache-control"] == "no-store"
    assert complete(house, secret).status_code == 200
    for path in ("/admin/keys", f"/admin/keys/{key_id}"):
        answer = call(house, "GET", path, ADMIN)
        assert answer.status_code == 200
        assert secret not in answer.text
        assert "digest" not in answer.text
    registry = registry_of(data)
    for file in registry.parent.glob("registry.db*"):
        if "reserve" not in file.name:
            assert secret.encode() not in file.read_bytes()
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE((data / "audit.jsonl").stat().st_mode) == 0o600
    assert secret not in (data / "audit.jsonl").read_text()


def test_with_keys_nobody_asks_without_one(house: Running) -> None:
    for key in (None, "guess", "mlk_guess"):
        assert complete(house, key).status_code == 401
        assert call(house, "GET", "/v1/models", key).status_code == 401
    secret = new_key(house, "acme")
    assert call(house, "GET", "/v1/models", None, **{"x-api-key": secret}).status_code == 200
    assert call(house, "GET", "/v1/models", None, **{"x-api-key": secret[:-1]}).status_code == 401


def test_a_server_that_had_keys_stays_closed(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server:
        assert complete(server, None).status_code == 200
        made = call(server, "POST", "/admin/keys", None, {"tenant": "acme"}).json()
        assert call(server, "DELETE", f"/admin/keys/{made['id']}", None).json()["state"] == "revoked"
        assert complete(server, None).status_code == 401
        answer = complete(server, made["key"])
        assert (answer.status_code, error(answer)["code"]) == (401, "invalid_api_key")
        assert "revoked" in error(answer)["message"]
        assert call(server, "GET", "/adapters", None).status_code == 200, "this machine's programs manage it"


def test_a_key_expires(house: Running, data: Path) -> None:
    with AdapterRegistry(registry_of(data)) as registry:
        _, late = registry.keys.create(KeyTerms("acme", expires_at=datetime(2020, 1, 1, tzinfo=UTC)))
    answer = complete(house, late)
    assert answer.status_code == 401
    assert "expired" in error(answer)["message"]
    assert complete(house, new_key(house, "acme", expires_at="2999-01-01T00:00Z")).status_code == 200
    for wrong in ("soon", "2020-01-01"):
        answer = call(house, "POST", "/admin/keys", ADMIN, {"tenant": "acme", "expires_at": wrong})
        assert (answer.status_code, error(answer)["code"]) == (400, "invalid_key")


def test_a_key_is_rotated(house: Running) -> None:
    made = call(house, "POST", "/admin/keys", ADMIN, {"tenant": "acme"}).json()
    path = f"/admin/keys/{made['id']}/rotate"
    second = call(house, "POST", path, ADMIN, {"overlap_seconds": 600}).json()["key"]
    assert [complete(house, each).status_code for each in (made["key"], second)] == [200, 200]
    third = call(house, "POST", path, ADMIN, {}).json()["key"]
    assert [complete(house, each).status_code for each in (made["key"], second, third)] == [401, 401, 200]
    assert call(house, "POST", "/admin/keys/key-000000000000/rotate", ADMIN, {}).status_code == 404


def test_another_process_makes_and_revokes_keys(house: Running, data: Path) -> None:
    with AdapterRegistry(registry_of(data)) as registry:
        record, secret = registry.keys.create(KeyTerms("acme", requests_per_minute=50))
        assert complete(house, secret).status_code == 200
        registry.keys.revoke(record.id)
    house.wait_until("noticed", lambda: complete(house, secret).status_code == 401)


def test_what_a_key_may_not_use_is_not_there(house: Running) -> None:
    acme, all_of_nobodys = new_key(house, "acme", models=["a", "acme/*"]), new_key(house, "acme")
    literal = new_key(house, "acme", models=["*", "globex/*"])
    assert names(house, acme) == {"a", "acme/x"}
    assert names(house, all_of_nobodys) == {BASE, "a", "b", "acme/x"}
    assert names(house, literal) == {BASE, "a", "b", "acme/x", "globex/secret", "blend"}
    assert names(house, ADMIN) == names(house, literal)
    for model in (
        "b",
        BASE,
        "globex/secret",
        "blend",
        "nothing",
        "a:0.5+globex/secret:0.5",
        "a+b",
        "globex/secret:2",
    ):
        for answer in (
            complete(house, acme, model),
            call(house, "POST", "/tokenize", acme, {"model": model, "prompt": "x"}),
            call(house, "POST", "/detokenize", acme, {"model": model, "tokens": [5]}),
            call(house, "POST", "/v1/embeddings", acme, {"model": model, "input": "x"}),
            call(house, "GET", f"/v1/models/{model}", acme),
        ):
            assert answer.status_code == 404, (model, answer.text)
            assert error(answer)["code"] == "model_not_found"
            told = error(answer)["message"].split(";")[-1]
            assert told in (" models: a, acme/x", " adapters: a, acme/x")
    hidden = complete(house, acme, "globex/secret"), complete(house, acme, "globex/nothing")
    said = [error(answer)["message"].replace("nothing", "secret") for answer in hidden]
    assert said[0] == said[1], "what is hidden is told as what isn't there"
    parts = {"adapters": [{"name": "globex/secret"}]}
    assert complete(house, literal, BASE, **parts).status_code == 200
    assert complete(house, all_of_nobodys, BASE, **parts).status_code == 404


def test_a_pattern_may_name_one_version(house: Running) -> None:
    first, second = new_key(house, "acme", models=["b@1"]), new_key(house, "acme", models=["b@2"])
    assert (names(house, first), names(house, second)) == ({"b"}, set())
    assert call(house, "PUT", "/adapters/b", ADMIN, {"src": "c"}).json()["version"] == 2
    assert (names(house, first), names(house, second)) == (set(), {"b"})
    assert [complete(house, each, "b").status_code for each in (first, second)] == [404, 200]


def test_rights_are_kept_apart(house: Running) -> None:
    asks, manages = new_key(house, "acme"), new_key(house, "acme", rights=["manage"])
    for path in ("/adapters", "/exports", "/admin/keys"):
        assert call(house, "GET", path, asks).status_code == 403
    assert complete(house, manages).status_code == 403
    assert call(house, "GET", "/adapters", manages).status_code == 200
    for path in ("/exports", "/admin/keys"):
        assert call(house, "GET", path, manages).status_code == 403
    operator = new_key(house, "ops", rights=["admin"], models=["nothing"])
    for path in ("/adapters", "/exports", "/admin/keys", "/v1/models"):
        assert call(house, "GET", path, operator).status_code == 200
    assert "globex/secret" in names(house, operator)
    assert call(house, "POST", "/admin/keys", ADMIN, {"tenant": "a", "rights": ["root"]}).status_code == 400


def test_a_tenant_is_told_who_exports(house: Running) -> None:
    key = new_key(house, "acme", rights=["infer", "manage"])
    answers = [
        call(house, "POST", f"/adapters/{name}/export", key, {"format": "peft"})
        for name in ("acme/x", "acme/nobody", "globex/secret")
    ]
    answers += [
        call(house, "POST", "/exports", key, {"model": "acme/x"}),
        call(house, "GET", "/exports/export-0123456789abcdef", key),
        call(house, "GET", "/adapters/acme/x/export/export-0123456789abcdef/download", key),
        call(house, "DELETE", "/exports/export-0123456789abcdef", key),
    ]
    assert [answer.status_code for answer in answers] == [403] * 7
    (said,) = {error(answer)["message"] for answer in answers}
    assert "holds the base's weights" in said
    assert "who runs the server may" in said


def _without_names(answers: Sequence[httpx.Response], names: Sequence[str]) -> int:
    """Return how many different errors these are, but for the name that each asked for."""
    told = [json.dumps(error(answer)) for answer in answers]
    return len({text.replace(repr(name), "it") for text, name in zip(told, names, strict=True)})


def test_a_tenant_manages_its_own_namespace_alone(house: Running) -> None:
    key = new_key(house, "acme", rights=["infer", "manage"], models=["a"])

    def listed() -> set[str]:
        return {each["name"] for each in call(house, "GET", "/adapters", key).json()["data"]}

    assert listed() == {"acme/x"}
    made = call(house, "POST", "/adapters", key, {"name": "acme/new", "src": "y"})
    assert (made.status_code, made.json()["src"]) == (201, "y")
    mixed = {"name": "acme/mix", "mixture": [{"adapter": "a"}, {"adapter": "acme/new", "weight": 0.5}]}
    assert call(house, "POST", "/adapters", key, mixed).status_code == 201
    assert complete(house, key, "acme/mix").status_code == 200
    assert names(house, key) == {"a", "acme/x", "acme/new", "acme/mix"}
    for name in ("new", "globex/new", "globex/secret", "acme", "acmes/new"):
        answer = call(house, "POST", "/adapters", key, {"name": name, "src": "y"})
        assert (answer.status_code, error(answer)["code"]) == (403, "forbidden"), name
        answer = call(house, "POST", "/v1/load_lora_adapter", key, {"lora_name": name, "lora_path": "y"})
        assert answer.status_code == 403
    stolen = {"name": "acme/stolen", "mixture": [{"adapter": "globex/secret"}]}
    assert error(call(house, "POST", "/adapters", key, stolen))["code"] == "model_not_found"
    for method, body in (("GET", None), ("PUT", {"src": "y"}), ("DELETE", None)):
        foreign = ("globex/secret", "globex/nothing", "a", "blend")
        answers = [call(house, method, f"/adapters/{name}", key, body) for name in foreign]
        assert {answer.status_code for answer in answers} == {404}
        assert _without_names(answers, foreign) == 1, "what is there is told of as what isn't"
    unloads = [
        call(house, "POST", "/v1/unload_lora_adapter", key, {"lora_name": name})
        for name in ("globex/secret", "globex/nothing")
    ]
    assert {answer.status_code for answer in unloads} == {404}
    assert _without_names(unloads, ("globex/secret", "globex/nothing")) == 1
    pinned = call(house, "PUT", "/adapters/acme/new", key, {"src": "y", "pin": True})
    assert pinned.status_code == 403
    behind = {"name": (None, b"acme/late"), "file": ("adapter_config.json", b"{}"), "pin": (None, b"true")}
    head = {"authorization": f"Bearer {key}"}
    for method, path in (("POST", "/adapters"), ("PUT", "/adapters/acme/new")):
        form = behind if method == "POST" else {name: behind[name] for name in ("file", "pin")}
        pinned = httpx.request(method, house.url + path, files=form, headers=head, timeout=30)
        assert (pinned.status_code, error(pinned)["code"]) == (403, "forbidden")
    for name in ("acme/mix", "acme/new"):
        assert call(house, "DELETE", f"/adapters/{name}", key).status_code == 200
    assert listed() == {"acme/x"}


def test_a_tenant_reads_from_its_own_folder_alone(house: Running, files: Files) -> None:
    key = new_key(house, "acme", rights=["manage"])
    (files.adapters / "acme" / "link").unlink(missing_ok=True)
    (files.adapters / "acme" / "link").symlink_to(files.adapters / "globex" / "secret")
    for src in ("../globex/secret", str(files.adapters / "globex" / "secret"), "../a", "link"):
        answer = call(house, "POST", "/adapters", key, {"name": "acme/stolen", "src": src})
        assert (answer.status_code, error(answer)["code"]) == (403, "adapter_path_forbidden"), src
    missing = call(house, "POST", "/adapters", key, {"name": "acme/stolen", "src": "secret"})
    assert error(missing)["code"] == "adapter_not_found"


def test_a_namespace_has_a_quota(house: Running) -> None:
    rows = new_key(house, "acme", rights=["manage"], adapter_rows=8)
    answer = call(house, "POST", "/adapters", rows, {"name": "acme/new", "src": "y"})
    assert (answer.status_code, error(answer)["code"]) == (403, "namespace_full")
    assert "12 rank rows, at most 8" in error(answer)["message"]
    assert call(house, "PUT", "/adapters/acme/x", rows, {"src": "y"}).status_code == 200, "in its place"
    assert call(house, "PUT", "/adapters/acme/x", rows, {"src": "x"}).status_code == 200
    nbytes = new_key(house, "acme", rights=["manage"], adapter_bytes=1000)
    answer = call(house, "POST", "/adapters", nbytes, {"name": "acme/new", "src": "y"})
    assert (answer.status_code, "bytes" in error(answer)["message"]) == (403, True)
    assert call(house, "GET", "/adapters/acme/new", ADMIN).status_code == 404


def test_prefixes_are_shared_within_a_tenant_alone(house: Running, files: Files, tmp_path: Path) -> None:
    def cached(server: Running, key: str) -> int:
        answer = complete(server, key, prompt="what the other one asked, word by word, for a while").json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    acme, also_acme, globex = (new_key(house, each) for each in ("acme", "acme", "globex"))
    found = [cached(house, key) for key in (acme, globex, also_acme)]
    assert found[:2] == [0, 0]
    assert found[2] > 0
    with running(files, tmp_path, admin_key=ADMIN, share_prefixes=True) as server:
        acme, globex = (new_key(server, each) for each in ("acme", "globex"))
        assert cached(server, acme) == 0
        assert cached(server, globex) > 0


def test_grammars_are_shared_within_a_tenant_alone(house: Running) -> None:
    grammars = house.server.deps.grammars
    assert grammars is not None
    keys = [new_key(house, each) for each in ("acme", "globex", "acme")] + [ADMIN]
    compiled = [grammars.compiled]
    for key in keys:
        assert complete(house, key, guided_regex="(what|others) asked").status_code == 200
        compiled.append(grammars.compiled)
    assert [later - before for before, later in pairwise(compiled)] == [1, 1, 0, 1]


def test_metrics_name_nobodys_adapters_to_strangers(house: Running) -> None:
    acme, globex = new_key(house, "acme"), new_key(house, "globex")
    assert complete(house, acme, "acme/x").status_code == 200
    assert complete(house, globex, "globex/secret").status_code == 200
    told = {key: call(house, "GET", "/metrics", key).text for key in (None, "guess", acme, globex, ADMIN)}
    for key in (None, "guess", acme):
        assert "globex" not in told[key]
        assert 'adapter="' not in told[key].replace('adapter="acme/', "")
    assert 'manylora_tokens_total{adapter="acme/x"' in told[acme]
    assert "acme" not in told[globex] + str(told[None])
    assert all(name in told[ADMIN] for name in ("acme/x", "globex/secret"))
    assert "manylora_requests_running" in told[None]


def test_acts_are_written_down(house: Running, data: Path) -> None:
    key = new_key(house, "acme", rights=["manage"])
    answer = call(
        house, "POST", "/adapters", key, {"name": "globex/new", "src": "y"}, **{"x-request-id": "act-1"}
    )
    assert answer.status_code == 403
    assert call(house, "GET", "/adapters", key, **{"x-request-id": "look-1"}).status_code == 200
    path = data / "audit.jsonl"
    house.wait_until("written", lambda: "act-1" in path.read_text())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (act,) = [line for line in lines if line["request_id"] == "act-1"]
    assert (act["act"], act["name"], act["tenant"]) == ("POST /adapters", "globex/new", "acme")
    assert (act["status"], act["result"], act["code"]) == (403, "refused", "forbidden")
    assert act["who"].startswith("key-")
    assert not [line for line in lines if line["request_id"] == "look-1"]
    made = [line for line in lines if line["act"] == "POST /admin/keys"]
    assert {line["who"] for line in made} == {"--admin-key"}
    assert all(line["made"].startswith("key-") for line in made if line["status"] == 201)


def test_who_is_not_let_in_is_written_down(house: Running, data: Path) -> None:
    made = call(house, "POST", "/admin/keys", ADMIN, {"tenant": "acme", "rights": ["manage"]}).json()
    call(house, "DELETE", f"/admin/keys/{made['id']}", ADMIN)
    came = {"revoked": made["key"], "guess": "mlk_guess", "none": None}
    for name, key in came.items():
        answer = call(house, "DELETE", "/adapters/acme/x", key, **{"x-request-id": f"refused-{name}"})
        assert answer.status_code == 401
    path = data / "audit.jsonl"
    house.wait_until("written", lambda: path.read_text().count('"refused-') == 3)
    lines = {line["request_id"]: line for line in map(json.loads, path.read_text().splitlines())}
    told = {name: lines[f"refused-{name}"] for name in came}
    assert {name: line["who"] for name, line in told.items()} == {
        "revoked": made["id"],
        "guess": "nobody",
        "none": "nobody",
    }
    for line in told.values():
        assert (line["act"], line["name"]) == ("DELETE /adapters/{name}", "acme/x")
        assert (line["status"], line["result"]) == (401, "refused")


def test_a_namespace_holds_so_many_mixtures(house: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.server.catalog.mixtures.MOST_OF_TENANT", 2)
    key = new_key(house, "acme", rights=["manage"])

    def mix(name: str, key: str, method: str = "POST", weight: float = 1.0) -> int:
        body: dict[str, object] = {"mixture": [{"adapter": "a", "weight": weight}, {"adapter": "acme/x"}]}
        path = "/adapters" if method == "POST" else f"/adapters/{name}"
        answer = call(house, method, path, key, {"name": name, **body} if method == "POST" else body)
        assert answer.status_code < 400 or error(answer)["code"] == "namespace_full", answer.text
        return answer.status_code

    assert [mix(f"acme/{each}", key) for each in (1, 2, 3, 1)] == [201, 201, 403, 200]
    assert mix("acme/2", key, "PUT", 0.5) == 200, "in its place"
    assert mix("acme/3", ADMIN) == 201, "who runs the server has no bound"
    assert mix("acme/4", key) == 403
    for each in (1, 2, 3):
        assert call(house, "DELETE", f"/adapters/acme/{each}", key).status_code == 200
    assert mix("acme/4", key) == 201
    assert call(house, "DELETE", "/adapters/acme/4", key).status_code == 200


def test_no_key_is_logged(house: Running, data: Path) -> None:
    secret = new_key(house, "acme")
    with house.logged() as lines:
        complete(house, secret)
        complete(house, f"{secret}x")
        call(house, "GET", "/v1/models", None, **{"x-api-key": secret})
        house.wait_until("logged", lambda: len(lines) >= 3)
    assert secret[4:] not in str(lines)
    assert {"tenant": "acme"}.items() <= lines[0].items()
    with sqlite3.connect(registry_of(data)) as connection:
        assert secret not in str(connection.execute("SELECT * FROM keys").fetchall())

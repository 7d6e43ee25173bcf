"""Hostile requests about adapters: huge ones, bombs in their configs, templates and headers, names, races."""

import json
from random import Random
from urllib.parse import quote

from manylora.loadtest.checks.bars.hostile.exchange import Exchange, call, request
from manylora.loadtest.checks.bars.hostile.kind import Plan, Scene

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
# One that is asked while it is registered and deleted by others; all clients of this kind share it.
CONTESTED = "contested"


def huge_adapters(rng: Random, scene: Scene) -> Plan:
    """Register a finite adapter that overflows, ask it beside everybody else, delete it, sometimes while it runs."""
    name = scene.name("huge")
    asks = tuple(_ask(rng, name, rng.choice((1, 8, 32))) for _ in range(rng.randint(1, 3)))
    register = _register(name, rng.choice(scene.of_kind("huge")), preload=rng.random() < 0.5)
    if rng.random() < 0.5:
        return ((register,), asks, (_delete(name),))
    return ((register,), (*asks, _delete(name, abort=rng.random() < 0.5)), (_delete(name),))


def pattern_bombs(rng: Random, scene: Scene) -> Plan:
    """Register configs whose patterns keep a backtracking engine busy."""
    return _register_ask_delete(rng, scene, "pattern")


def template_bombs(rng: Random, scene: Scene) -> Plan:
    """Register templates that take time or memory without end, or fail, and chat with them."""
    name = scene.name("template")
    chat = {"model": name, "messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 4}
    tokenize = {"model": name, "messages": chat["messages"]}
    asks = (call("POST", CHAT, chat), call("POST", "/tokenize", tokenize))
    return ((_register(name, rng.choice(scene.of_kind("template"))),), asks, (_delete(name),))


def odd_configs(rng: Random, scene: Scene) -> Plan:
    """Register configs with fields that can't be honoured."""
    return _register_ask_delete(rng, scene, "config")


def odd_weights(rng: Random, scene: Scene) -> Plan:
    """Register weights whose headers are huge, lie, or hold nothing that can be served."""
    return _register_ask_delete(rng, scene, "header")


def sources(rng: Random, scene: Scene) -> Plan:
    """Sources outside the root, or of a kind that isn't served."""
    source = rng.choice(
        (
            "/etc",
            "../demo",
            "..",
            ".",
            "",
            "/proc/self",
            "/dev/zero",
            "file:///etc",
            "file://[::1",
            "file://host/etc",
            "http://127.0.0.1:1/",
            "s3://bucket/key",
            "a" * 5000,
            "a/" * 3000,
            "\0",
            "\ud800",
            "~root",
            "nowhere",
            "huge-alpha0/adapter_config.json",
        )
    )
    name = scene.name("source")
    return ((_register(name, source),), (_delete(name),))


def odd_names(rng: Random, scene: Scene) -> Plan:
    """Names that routes shadow, that the base has, that can't stand in a path."""
    name = rng.choice(
        (
            f"team{scene.number}/export/1",
            f"x{scene.number}/export/y/download",
            f"e{scene.number}/export",
            "export",
            "demo",
            "",
            "/",
            "a//b",
            "..",
            "a/../b",
            "a" * 2000,
            "\0",
            "\ud800",
            "a b",
            "a?b",
            "a%2fb",
            "💥",
            5,
            None,
        )
    )
    made = _register(name, "pirate")
    if not isinstance(name, str):
        return ((made,),)
    return ((made,), (request("GET", _path(name)),), (_ask(rng, name, 4),), (_delete(name),))


def contested(rng: Random, scene: Scene) -> Plan:
    """Load, replace, ask and unload one name from many clients at once, by our routes and by vLLM's."""
    source = rng.choice(("pirate", "sql", "json"))
    return (
        (
            call("POST", LOAD, {"lora_name": CONTESTED, "lora_path": source, "load_inplace": True}),
            call(
                "POST", LOAD, {"lora_name": CONTESTED, "lora_path": "sql", "load_inplace": rng.random() < 0.5}
            ),
            _register(CONTESTED, source),
            request("PUT", _path(CONTESTED), json.dumps({"src": "json", "preload": True}).encode()),
            _ask(rng, CONTESTED, 8),
        ),
        (
            _ask(rng, CONTESTED, 8),
            call("POST", UNLOAD, {"lora_name": CONTESTED}),
            _delete(CONTESTED, abort=True),
        ),
        (_delete(CONTESTED),),
    )


def routers_loads(rng: Random, scene: Scene) -> Plan:
    """vLLM's load requests as routers send them, and as nobody does."""
    name = scene.name("router")
    body: dict[str, object] = {"lora_name": name, "lora_path": rng.choice(("sql", "nowhere", "config-rank"))}
    body |= rng.choice(
        (
            {},
            {"base_model_name": ""},
            {"base_model_name": "demo", "load_inplace": False, "is_3d_lora_weight": False},
            {"base_model_name": "other"},
            {"lora_int_id": 2**63, "long_lora_max_len": None},
            {"lora_path": 5},
            {"load_inplace": "true"},
        )
    )
    unload: dict[str, object] = {
        "lora_name": name,
        **rng.choice(({}, {"lora_int_id": 2**70}, {"lora_int_id": "a"})),
    }
    return (
        (call("POST", LOAD, body),),
        (_ask(rng, name, 4),),
        (call("POST", UNLOAD, unload),),
        (_delete(name),),
    )


def deleted_while_running(rng: Random, scene: Scene) -> Plan:
    """Long streams on a good adapter that is deleted, replaced and registered under them."""
    name = scene.name("running")
    asks = tuple(_ask(rng, name, 200, stream=True) for _ in range(3))
    delete = _delete(name, abort=rng.random() < 0.5)
    replace = request("PUT", _path(name), json.dumps({"src": "sql"}).encode())
    return ((_register(name, "pirate", preload=True),), (*asks, replace, delete), (_delete(name),))


def _register_ask_delete(rng: Random, scene: Scene, kind: str) -> Plan:
    name = scene.name(kind)
    return ((_register(name, rng.choice(scene.of_kind(kind))),), (_ask(rng, name, 4),), (_delete(name),))


def _register(name: object, source: str, *, preload: bool = False) -> Exchange:
    return call("POST", "/adapters", {"name": name, "src": source, "preload": preload})


def _delete(name: str, *, abort: bool = False) -> Exchange:
    return request("DELETE", _path(name) + ("?abort=true" if abort else ""))


def _path(name: str) -> str:
    return f"/adapters/{quote(name, errors='surrogatepass')}"


def _ask(rng: Random, name: str, max_tokens: int, *, stream: bool = False) -> Exchange:
    body: dict[str, object] = {
        "model": name,
        "prompt": [rng.randrange(3, 1000) for _ in range(rng.choice((1, 40, 300)))],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    return call("POST", COMPLETIONS, body)

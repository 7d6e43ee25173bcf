"""`python -m manylora.loadtest.checks.api_fuzz`: requests made from /openapi.json, and every answer held against it.

A server of the demo is started unless `--url` names one, which then gets new adapters and loses some. Half of the
requests keep to the description and half break it; with an admin key a third of them come with the key of a tenant, of
one that is at its limits, with a wrong one or with none. What is told: a 5xx, a status, a header or a content type that
isn't described, an answer of another form, and an answer that doesn't come; and how many succeeded.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from rich.console import Console
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Err
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from manylora.loadtest.material.server_process import running, start_server

ANSWER_SECONDS = 60.0
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MOST_TOKENS = 16
MADE = {
    "file_id": ("/v1/files",),
    "batch_id": ("/v1/batches",),
    "key": ("/admin/keys",),
    "job": ("/exports", "/adapters/{name}/export"),
}
"""Which routes make what paths have a name for."""
NEEDED = frozenset(
    "model messages prompt input max_tokens tokens query documents text_1 text_2 name src mixture tenant".split()  # noqa: SIM905
)
ADMIN_KEY = "of-a-server-for-this-check-alone"
EXAMPLES, SEED = 500, 1


@dataclass(frozen=True, slots=True)
class Known:
    """What is there on the server, so that some requests meet it."""

    models: tuple[str, ...]
    sources: tuple[str, ...] = ()
    """Directories of adapters, as ``src`` names them."""
    key: str | None = None
    """What opens all routes: once requests have made keys, nobody asks without one."""
    other_keys: tuple[str | None, ...] = ()
    """Keys that open some routes or none, for a third of the requests; None: none is sent."""
    made: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in MADE})
    """What requests have made since, by what paths call it."""


def headers_of(key: str | None) -> dict[str, str]:
    """Return what a request with a key carries."""
    return {} if key is None else {"authorization": f"Bearer {key}"}


def other_keys(url: str, admin: str) -> tuple[str | None, ...]:
    """Make keys of a tenant, one with room and one without; return them, a wrong one and none."""
    made: list[str | None] = [None, "wrong"]
    narrow = {"requests_per_minute": 1, "parallel": 1, "budget": 64, "adapter_rows": 1}
    for terms in ({"rights": ["infer", "manage"]}, {"rights": ["infer", "manage"], **narrow}):
        body: dict[str, Any] = {"tenant": "acme", **terms}
        answer = requests.post(
            f"{url}/admin/keys", json=body, headers=headers_of(admin), timeout=ANSWER_SECONDS
        )
        answer.raise_for_status()
        made.append(answer.json()["key"])
    return tuple(made)


@dataclass(slots=True)
class Held:
    """What came of an operation's requests."""

    wrong: list[str] = field(default_factory=list)
    """What was told."""
    statuses: Counter[int] = field(default_factory=Counter)


def fuzz(url: str, known: Known, examples: int, first: int) -> dict[str, Held]:
    """Send ``examples`` requests of both kinds to each operation, from seed ``first``; return what came of each.

    The same arguments make the same requests, but for ids and keys that the server makes.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found: dict[str, Held] = {}
    for result in schema.get_all_operations():
        if isinstance(result, Err):
            raise result.err()
        operation = result.ok()
        held = found[operation.label] = Held()
        for mode in GenerationMode:
            _try(operation, mode, known, examples, first, held)
    return found


def _try(operation: Any, mode: GenerationMode, known: Known, examples: int, first: int, held: Held) -> None:
    if mode is GenerationMode.NEGATIVE and not (
        operation.body or operation.path_parameters or operation.query
    ):
        return

    # Nothing is shrunk: the request is in the message.
    @seed(first)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def ask(case: Any, data: st.DataObject) -> None:
        _meet(case, mode, known, data)
        key = known.key
        if known.other_keys:
            key = data.draw(st.sampled_from([key] * 2 * len(known.other_keys) + [*known.other_keys]))
        try:
            response = case.call(timeout=ANSWER_SECONDS, headers=headers_of(key))
            held.statuses[response.status_code] += 1
            _note(case, response, known)
            case.validate_response(response, checks=CHECKS)
        except (FailureGroup, AssertionError) as error:
            held.wrong.append(str(error))
        except requests.Timeout:
            held.wrong.append(f"no answer within {ANSWER_SECONDS:g} s: {case.as_curl_command()}")

    try:
        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # an operation without parameters can't be asked wrongly


def _meet(case: Any, mode: GenerationMode, known: Known, data: st.DataObject) -> None:
    """Put names that exist into half of the places where a name is asked for, not of deletions; ask for few tokens."""
    if isinstance(case.body, dict):
        if mode is GenerationMode.POSITIVE and data.draw(st.booleans()):
            _thin(case.body, data)
        _name(case.body, known, data)
        if {"messages", "prompt"} & case.body.keys() and "v1" in case.path:
            _shorten(case.body, "max_tokens")
        elif case.path.endswith("/responses"):
            _shorten(case.body, "max_output_tokens")
    parameters, reads = case.path_parameters, case.method.upper() in ("GET", "POST")
    for key in [*parameters] if isinstance(parameters, Mapping) else ():
        values = known.models if key in ("model", "name") and reads else known.made.get(key)
        if values and data.draw(st.booleans()):
            parameters[key] = data.draw(st.sampled_from(values))


def _name(body: dict[str, Any], known: Known, data: st.DataObject) -> None:
    """Put names that exist into a body."""
    sources = known.sources
    places = {
        "model": known.models,
        "src": sources,
        "lora_path": sources,
        "input_file_id": known.made["file_id"],
    }
    for key, values in places.items():
        if key in body and values and data.draw(st.booleans()):
            body[key] = data.draw(st.sampled_from(values))
    for key, part in (("adapters", "name"), ("mixture", "adapter")):
        for each in body[key] if isinstance(body.get(key), list) else ():
            if isinstance(each, dict) and part in each and data.draw(st.booleans()):
                each[part] = data.draw(st.sampled_from(known.models))


def _note(case: Any, response: Any, known: Known) -> None:
    """Remember what a request made."""
    for name, paths in MADE.items():
        if case.method.upper() == "POST" and case.path in paths and response.status_code < 300:
            known.made[name].append(response.json()["id"])


def _thin(body: dict[str, Any], data: st.DataObject) -> None:
    """Few fields go with each other: with most of them there, next to nothing is answered."""
    for key in [key for key in body if key not in NEEDED]:
        if data.draw(st.booleans()):
            del body[key]


def _shorten(body: dict[str, Any], limit: str) -> None:
    """A thousand tokens take their time, and what doesn't come is to be told from what is long."""
    limits = [
        key
        for key in ("max_tokens", "max_completion_tokens", "max_output_tokens")
        if body.get(key) is not None
    ]
    for key in limits:
        if isinstance(body[key], int):
            body[key] = min(body[key], MOST_TOKENS)
    if not limits:
        body[limit] = MOST_TOKENS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m manylora.loadtest.checks.api_fuzz", description=__doc__)
    parser.add_argument("--url", help="a server that is running; none: one of the demo is started")
    parser.add_argument("--admin-key", help="its admin key, if it has one")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="for each operation and kind")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    if options.url is not None:
        return _report(options.url.rstrip("/"), options.admin_key, options.examples, options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        server = start_server(None, Path(scratch), ("--admin-key", ADMIN_KEY))
        with running(server):
            return _report(server.url, ADMIN_KEY, options.examples, options.seed)


def _report(url: str, key: str | None, examples: int, first: int) -> int:
    console = Console()
    models = requests.get(f"{url}/v1/models", headers=headers_of(key), timeout=ANSWER_SECONDS).json()["data"]
    others = () if key is None else other_keys(url, key)
    known = Known(tuple(model["id"] for model in models), key=key, other_keys=others)
    found = fuzz(url, known, examples, first)
    for label, held in found.items():
        told = f"{len(held.wrong)} wrong" if held.wrong else "as described"
        console.print(f"{label}: {told} ({dict(sorted(held.statuses.items()))})", highlight=False)
        for each in dict.fromkeys(held.wrong[:5]):
            console.print(each, markup=False)
    return 1 if any(held.wrong for held in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

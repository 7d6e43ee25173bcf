"""`manylora keys`: make, list, change, revoke and rotate API keys, in a data directory or on a running server.

Without --url it works on the data directory, whether a server runs on it or not: one that does knows within a second.
With --url it asks that server, as anyone with its admin key may.
"""

import getpass
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from manylora.adapters.audit import FILE as AUDIT_FILE
from manylora.adapters.audit import append
from manylora.adapters.errors import AdapterError
from manylora.adapters.keys import LIMITS, KeyChange, KeyRecord, KeyTerms, parse_terms
from manylora.adapters.pairing import REGISTRY_FILE
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters_command.server import AdminKey, AskedServer
from manylora.failing import fail
from manylora.home import name_in
from manylora.server.tenants.told import described


def _flag(limit: str) -> str:
    """Return what a limit is called on the command line."""
    return limit.removesuffix("_at").replace("_", "-")


def _term(flag: str) -> str:
    """Return what a limit of the command line is called elsewhere; what is none stays, to be refused."""
    return next((limit for limit in LIMITS if _flag(limit) == flag), flag)


app = typer.Typer(
    no_args_is_help=True, help="API keys: in the data directory, or with --url on a running server."
)
DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="MANYLORA_DATA_DIR", help="The server's.", show_default=True)
]
Base = Annotated[
    str | None, typer.Option("--base", help="Name of the base, if the data directory has several.")
]
AuditPath = Annotated[
    Path | None,
    typer.Option(
        "--audit-log", envvar="MANYLORA_AUDIT_LOG", help="The server's; none: audit.jsonl in --data-dir."
    ),
]
Url = Annotated[
    str | None, typer.Option("--url", envvar="MANYLORA_URL", help="A running server; none: --data-dir.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Models that it may use, as sql, team-* or sql@3; none: *. Repeatable."),
]
Rights = Annotated[
    list[str] | None,
    typer.Option("--right", help="infer, manage (its namespace) or admin; none: infer. Repeatable."),
]
Requests = Annotated[int | None, typer.Option(help="Requests in any minute.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens in any minute.")]
Parallel = Annotated[int | None, typer.Option(help="Requests under way at the same time.")]
Budget = Annotated[int | None, typer.Option(help="Tokens that it may ever use.")]
Weight = Annotated[float, typer.Option(help="Turns of its tenant in the queue.")]
Priority = Annotated[int, typer.Option(help="The least, most urgent priority that it may ask for.")]
Bytes = Annotated[int | None, typer.Option(help="Bytes of its tenant's adapters.")]
Rows = Annotated[int | None, typer.Option(help="Rank rows of its tenant's adapters.")]
Expires = Annotated[str | None, typer.Option(help="When it ends, as 2027-01-31 or 2027-01-31T12:00Z.")]
Unlimited = Annotated[
    list[str] | None,
    typer.Option(help=f"A limit that it is to do without: {', '.join(map(_flag, LIMITS))}. Repeatable."),
]
DEFAULT_DIR = Path(".manylora")
TOLD = ("requests_per_minute", "tokens_per_minute", "parallel", "budget")


@app.command("create")
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; its namespace is TENANT/…")],
    model: Models = None,
    right: Rights = None,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    parallel: Parallel = None,
    budget: Budget = None,
    weight: Weight = 1.0,
    priority: Priority = 0,
    adapter_bytes: Bytes = None,
    adapter_rows: Rows = None,
    expires: Expires = None,
    data_dir: DataDir = DEFAULT_DIR,
    base: Base = None,
    audit_log: AuditPath = None,
    url: Url = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once: what is kept opens nothing."""
    limits = (requests_per_minute, tokens_per_minute, parallel, budget, adapter_bytes, adapter_rows, expires)
    asked: dict[str, Any] = {"tenant": tenant, "models": model or ["*"], "rights": right or ["infer"]}
    asked |= {"weight": weight, "priority": priority, **dict(zip(LIMITS, limits, strict=True))}
    if url is not None:
        _show_secret(AskedServer(url, admin_key).get("POST", "/admin/keys", asked), as_json)
        return
    with _registry(data_dir, base) as registry:
        record, secret = registry.keys.create(KeyTerms(**parse_terms(asked)))
    _write_down(data_dir, audit_log, "keys create", record)
    _show_secret({**described(record), "key": secret}, as_json)


@app.command("ls")
def ls(
    data_dir: DataDir = DEFAULT_DIR,
    base: Base = None,
    url: Url = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """List all keys. Of a budget a running server tells what is used; offline what it has lent out counts as well."""
    if url is not None:
        found = AskedServer(url, admin_key).get("GET", "/admin/keys")["data"]
    else:
        with _registry(data_dir, base) as registry:
            found = [described(record) for record in registry.keys.all()]
    if as_json:
        _print_json({"object": "list", "data": found})
        return
    table = Table("id", "tenant", "state", "secret", "rights", "models", "limits")
    for key in found:
        table.add_row(
            *(key["id"], key["tenant"], key["state"], key["hint"]),
            *(", ".join(key["rights"]), ", ".join(key["models"]), _limits(key)),
        )
    Console(emoji=False).print(table)


@app.command("set")
def set_terms(
    key: Annotated[str, typer.Argument(help="Its id, as `ls` shows it.")],
    model: Models = None,
    right: Rights = None,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    parallel: Parallel = None,
    budget: Budget = None,
    weight: Annotated[float | None, typer.Option(help="Turns of its tenant in the queue.")] = None,
    priority: Annotated[int | None, typer.Option(help="The least, most urgent one it may ask for.")] = None,
    adapter_bytes: Bytes = None,
    adapter_rows: Rows = None,
    expires: Expires = None,
    unlimited: Unlimited = None,
    data_dir: DataDir = DEFAULT_DIR,
    base: Base = None,
    audit_log: AuditPath = None,
    url: Url = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Change what a key allows, from its next request on. What isn't named stays; models and rights are given anew."""
    limits = (requests_per_minute, tokens_per_minute, parallel, budget, adapter_bytes, adapter_rows, expires)
    named = {"models": model, "rights": right, "weight": weight, "priority": priority}
    asked: dict[str, Any] = {**dict(zip(LIMITS, limits, strict=True)), **named}
    asked = {name: value for name, value in asked.items() if value is not None}
    without = [_term(name) for name in unlimited or ()]
    if url is not None:
        changed = AskedServer(url, admin_key).get(
            "PATCH", f"/admin/keys/{key}", {**asked, "unlimited": without}
        )
    else:
        with _registry(data_dir, base) as registry:
            record = registry.keys.set_terms(key, KeyChange(parse_terms(asked), without))
        _write_down(data_dir, audit_log, "keys set", record, {**asked, "unlimited": without})
        changed = described(record)
    if as_json:
        _print_json(changed)
    else:
        told = _limits(changed) or "no limits"
        Console(emoji=False).print(f"changed {changed['id']} of {changed['tenant']}: {told}")


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="Its id, as `ls` shows it.")],
    data_dir: DataDir = DEFAULT_DIR,
    base: Base = None,
    audit_log: AuditPath = None,
    url: Url = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """End a key: requests that come then are refused, those under way go on."""
    if url is not None:
        ended = AskedServer(url, admin_key).get("DELETE", f"/admin/keys/{key}")
    else:
        with _registry(data_dir, base) as registry:
            record = registry.keys.revoke(key)
        _write_down(data_dir, audit_log, "keys revoke", record)
        ended = described(record)
    if as_json:
        _print_json(ended)
    else:
        Console(emoji=False).print(f"revoked {ended['id']} of {ended['tenant']}")


@app.command("rotate")
def rotate(
    key: Annotated[str, typer.Argument(help="Its id, as `ls` shows it.")],
    overlap: Annotated[
        int, typer.Option(min=0, max=30 * 86400, help="Seconds for which the secret before opens too.")
    ] = 0,
    data_dir: DataDir = DEFAULT_DIR,
    base: Base = None,
    audit_log: AuditPath = None,
    url: Url = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Give a key another secret, shown this once; its limits and what it has used stay."""
    if url is not None:
        body: dict[str, object] = {"overlap_seconds": overlap}
        _show_secret(AskedServer(url, admin_key).get("POST", f"/admin/keys/{key}/rotate", body), as_json)
        return
    with _registry(data_dir, base) as registry:
        record, secret = registry.keys.rotate(key, timedelta(seconds=overlap))
    _write_down(data_dir, audit_log, "keys rotate", record)
    _show_secret({**described(record), "key": secret}, as_json)


@contextmanager
def _registry(data_dir: Path, base: str | None) -> Iterator[AdapterRegistry]:
    """Open the registry of a base in a data directory; what goes wrong ends the command in one line."""
    try:
        with AdapterRegistry(_home(data_dir, base) / REGISTRY_FILE) as registry:
            yield registry
    except AdapterError as error:
        raise fail(str(error)) from None
    except OSError as error:
        raise fail(f"{error.filename or data_dir}: {error.strerror}") from None


def _home(data_dir: Path, base: str | None) -> Path:
    homes = sorted(path.parent for path in data_dir.glob(f"*/{REGISTRY_FILE}"))
    if not homes:
        raise fail(
            f"{data_dir} holds no registry: start the server on it once, or name another directory with --data-dir"
        )
    named = {home: name_in(home) or home.name for home in homes}
    fitting = [home for home in homes if base in (None, named[home], home.name)]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(f"{name} ({home.name})" for home, name in named.items())
    if not fitting:
        raise fail(f"{data_dir} holds no base {base!r}; bases: {known}")
    raise fail(
        f"{data_dir} holds several bases: name one with --base, by its name or its folder; bases: {known}"
    )


def _write_down(
    data_dir: Path,
    audit_log: Path | None,
    act: str,
    record: KeyRecord,
    changed: Mapping[str, object] | None = None,
) -> None:
    facts: dict[str, object] = {"who": f"command line, {getpass.getuser()}", "act": act, "made": record.id}
    if changed is not None:
        facts["changed"] = changed
    path = audit_log or data_dir / AUDIT_FILE
    try:
        append(path, {**facts, "tenant": record.terms.tenant, "result": "done"})
    except OSError as error:
        typer.echo(f"it isn't in the audit log: {path}: {error.strerror}", err=True)


def _limits(key: dict[str, Any]) -> str:
    told = [f"{name.replace('_', ' ')} {key[name]:,}" for name in TOLD if key[name] is not None]
    if key["budget"] is not None:
        told[-1] += f" ({key['used']:,} used)"
    return ", ".join(told)


def _show_secret(key: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(key)
        return
    # The secret alone on a line of stdout, so that a script can take it; the words beside it on stderr.
    typer.echo(f"{key['id']} of {key['tenant']}; the key is shown this once:", err=True)
    typer.echo(key["key"])


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))

"""`add`, `rm`, `mix`, `rollback` and `canary`: what a running server is asked to change."""

from typing import Annotated, Any

import typer

from manylora.adapters.errors import InvalidMixture
from manylora.adapters.mixtures import parse_mixture
from manylora.adapters_command import completion
from manylora.adapters_command.following import Registration, begin, follow
from manylora.adapters_command.looking import Name, show_versions
from manylora.adapters_command.server import DEFAULT_URL, AdminKey, AsJson, AskedServer, Url, path_of
from manylora.adapters_command.shown import (
    Shown,
    is_mixture,
    is_registration,
    print_json,
    say,
    say_served,
    size,
    spelled,
    stage,
)
from manylora.failing import fail

Source = Annotated[
    str,
    typer.Argument(
        help="A directory here, which is uploaded unless the server reads it itself; or what the server finds: a"
        " directory below its --adapter-root, hf://org/name, s3://…, https://…",
    ),
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is served, or failed.")]
SourceToken = Annotated[
    str | None,
    typer.Option(
        "--source-token", envvar="MANYLORA_SOURCE_TOKEN", help="For a source that asks for one; kept nowhere."
    ),
]
Adapter = Annotated[str, typer.Argument(help="An adapter.", autocompletion=completion.adapters)]
Preload = Annotated[bool, typer.Option("--preload", help="Put it on the device, now and at each start.")]
Pin = Annotated[bool, typer.Option("--pin", help="Keep it on the device.")]
Replace = Annotated[
    bool, typer.Option("--replace", help="Serve it in the place of what has the name, as the next version.")
]


def add(
    name: Adapter,
    src: Source,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    replace: Replace = False,
    preload: Preload = False,
    pin: Pin = False,
    wait: Wait = True,
    source_token: SourceToken = None,
    as_json: AsJson = False,
) -> None:
    """Serve an adapter under a name: running requests of what was there finish on it, and nothing stops meanwhile."""
    server = AskedServer(url, admin_key)
    # Only what was asked for: an adapter that is served already keeps the rest.
    wishes: dict[str, object] = {key: True for key, asked in (("preload", preload), ("pin", pin)) if asked}
    if source_token is not None:
        wishes["token"] = source_token
    if replace:
        wanted = Registration("PUT", path_of(name), wishes)
        cancel = f"`rm` would take what {name} is now, too"
    else:
        wanted = Registration("POST", "/adapters", {"name": name, **wishes})
        cancel = "`rm` ends it"
    found = begin(server, wanted, src)
    if wait:
        found = follow(server, name, found, cancel)
    if as_json:
        print_json(found)
    elif is_registration(found):
        _say_begun(name, found)
    else:
        say_served(found)


def replace(
    name: Adapter,
    src: Source,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Serve other weights under a name, as `add --replace` does."""
    add(name, src, url, admin_key, replace=True, as_json=as_json)


def mix(
    name: Name,
    parts: Annotated[
        list[str],
        typer.Argument(
            help="Adapters with weights, as sql:0.7 pirate:0.3.", autocompletion=completion.adapters
        ),
    ],
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    replace: Annotated[bool, typer.Option("--replace", help="Change a mixture that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve several adapters with weights under one name."""
    server = AskedServer(url, admin_key)
    # What is a name and what a weight in team:v2 is known there.
    known = {each["name"] for each in server.get("GET", "/adapters")["data"]}
    try:
        found = [part for text in parts for part in parse_mixture(text, known.__contains__)]
    except InvalidMixture as error:
        raise fail(str(error)) from None
    mixture = [{"adapter": part.adapter, "weight": part.weight} for part in found]
    if replace:
        made = server.get("PUT", path_of(name), {"mixture": mixture})
    else:
        made = server.get("POST", "/adapters", {"name": name, "mixture": mixture})
    if as_json:
        print_json(made)
        return
    say(f"serves {made['name']}, version {made['version']}: {spelled(made)} (id {made['id']})")


def rm(
    name: Name,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    abort: Annotated[bool, typer.Option("--abort", help="End running requests instead of waiting.")] = False,
    as_json: AsJson = False,
) -> None:
    """Refuse new requests, wait for running ones, give the memory back; of sql@2 delete that version alone."""
    server = AskedServer(url, admin_key)
    plain, _, version = name.partition("@")
    if version:
        if abort:
            raise fail(
                f"--abort goes with a whole name: version {version} of {plain} goes once its requests have ended"
            )
        left = server.get("DELETE", path_of(plain, "versions", _number(version)))
        print_json(left) if as_json else say(f"removed version {version} of {plain}")
        return
    gone = server.get("DELETE", path_of(name), params={"abort": str(abort).lower()})
    if as_json:
        print_json(gone)
    elif is_registration(gone):
        say(f"{name}: {stage(gone)}; nothing of it is left")
    elif is_mixture(gone):
        say(f"removed mixture {gone['name']}: {spelled(gone)}; its adapters stay")
    else:
        freed = gone["freed"]
        say(
            f"removed {gone['name']}: {freed['arena_rows']} rank rows, {size(freed['device_bytes'])} on the device "
            f"and {size(freed['host_bytes'])} on the host are free"
        )


def rollback(
    name: Adapter,
    version: Annotated[int | None, typer.Argument(help="Which version to go back to.", min=1)] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Go back to a version that is kept: without a number end the canary, or take the one before."""
    body = {} if version is None else {"version": version}
    found = AskedServer(url, admin_key).get("POST", path_of(name, "rollback"), body)
    if as_json:
        print_json(found)
        return
    say(f"{name} answers by version {found['active']}")
    show_versions(found)


def canary(
    name: Adapter,
    version: Annotated[int | None, typer.Option("--version", min=1, help="A version that is kept.")] = None,
    src: Annotated[
        str | None, typer.Option("--src", help="The next version, found as SRC of add is.")
    ] = None,
    share: Annotated[
        float | None, typer.Option("--share", min=0.0, max=1.0, help="Of the requests: 0.1 is a tenth.")
    ] = None,
    source_token: SourceToken = None,
    promote: Annotated[bool, typer.Option("--promote", help="Let it answer all requests.")] = False,
    end: Annotated[bool, typer.Option("--end", help="Let it answer none any more, or cancel it.")] = False,
    wait: Wait = True,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Try a version beside the one that answers, with a share of the requests; then promote it or end the trial."""
    trial = any(given is not None for given in (version, src, share))
    if promote + end + trial > 1:
        raise fail("--promote, --end and a trial's --share don't go together: one at a time")
    if trial and (share is None or (version is None) == (src is None)):
        raise fail("a trial needs --share and one of --version and --src")
    server, place = AskedServer(url, admin_key), path_of(name, "canary")
    if promote:
        found = server.get("POST", path_of(name, "canary", "promote"))
    elif end:
        found = server.get("DELETE", place)
    elif not trial:
        found = server.get("GET", path_of(name, "versions"))
    elif src is None:
        found = server.get("POST", place, {"version": version, "share": share})
    else:
        token = {} if source_token is None else {"token": source_token}
        found = begin(server, Registration("POST", place, {"share": share, **token}), src)
        found = _tried(server, name, found) if wait else found
    if as_json:
        print_json(found)
        return
    _say_begun(name, found) if is_registration(found) else show_versions(found)


def _tried(server: AskedServer, name: str, first: dict[str, Any]) -> dict[str, Any]:
    """Return a name's versions once a canary that has been begun is one of them."""
    if not is_registration(first):
        return first
    follow(server, name, first, f"`canary {name} --end` ends it")
    return server.get("GET", path_of(name, "versions"))


def _say_begun(name: str, registration: Shown) -> None:
    say(f"{name}: {stage(registration)}; `manylora adapters show {name}` tells how far it is")


def _number(version: str) -> str:
    if not version.isascii() or not version.isdigit():
        raise fail(f"{version!r} is no version: a number, as sql@2")
    return version

"""Names of adapters for the shell's completion, from the running server. Quick, and silent whatever goes wrong."""

import httpx
import typer

from manylora.adapters_command.server import DEFAULT_URL, AskedServer

SECONDS = 1.0
"""For all of it: nobody waits longer for a TAB."""


def names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of an adapter or a mixture."""
    return _beginning(context, incomplete, ("adapter", "mixture"))


def adapters(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of an adapter."""
    return _beginning(context, incomplete, ("adapter",))


def _beginning(context: typer.Context, incomplete: str, kinds: tuple[str, ...]) -> list[str]:
    url, key = (context.params.get(name) for name in ("url", "admin_key"))
    server = AskedServer(url or DEFAULT_URL, key)
    try:
        response = httpx.get(server.place("/adapters"), headers=server.headers, timeout=SECONDS)
        found = [each["name"] for each in response.json()["data"] if each["object"] in kinds]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return []
    return [name for name in found if name.startswith(incomplete)]

"""What a server still holds when nobody asks it anything."""

import asyncio
import time

from manylora.loadtest.checks.bars.material import AUDIT_AFTER
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.manylora_client import Client, Held, held

NOTHING = Held(0, 0, 0, 0, 0)
MIB = 1 << 20
AUDIT_SECONDS = AUDIT_AFTER + 0.4
"""The bars' servers audit their pools within this time once they are idle."""


async def quiet(client: Client, seconds: float = 20.0) -> Held:
    """Wait until no sequence is held and old versions are gone, and return what is held then."""
    deadline = time.monotonic() + seconds
    now = await held(client)
    while (now.sequences or now.blocks or now.adapters) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        now = await held(client)
    return now


async def report_books(report: Report, client: Client) -> None:
    """Give the server time to audit its pools; one whose books don't balance is never ready again."""
    await asyncio.sleep(AUDIT_SECONDS)
    ready = await client.ready()
    report.check("idle, the pools' books balance", "yes" if ready else "no", ready)

"""The audit log: who changed what on this server, when, and what came of it. One line when such a request is over.

Written by a thread of its own, in order, behind the answer: who administers doesn't wait for it, and a disk that takes
no line is told in the server's own log.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import Request
from structlog import get_logger

from manylora.adapters.audit import append
from manylora.server.api.http_metrics import route_of
from manylora.server.api.request_context import at_end, noted, request_id
from manylora.server.tenants.window import SlidingWindow

log = get_logger(__name__)
READING = frozenset({"GET", "HEAD", "OPTIONS"})
TOLD = ("name", "lora_name", "model", "mixture", "made", "changed", "versions", "canary", "code", "reason")
"""What a request notes of itself and the log repeats."""
STRANGER = "nobody"
"""Who came without a key that is known."""
MOST_OF_STRANGERS = 60
"""Lines a minute of those who weren't let in: anybody may send such requests, and each line is synced."""


class AuditLog:
    """Lines of one file, in the order in which requests ended."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` tells seconds and goes only forward."""
        self.path = path
        self._clock = clock
        self._strangers = SlidingWindow(MOST_OF_STRANGERS)
        self._left_out = 0
        self._writer = ThreadPoolExecutor(1, "audit")

    def write(self, facts: Mapping[str, object], *, let_in: bool = True) -> None:
        """Have a line written soon. Of those who weren't ``let_in``, what is too much is counted in the next line."""
        if not let_in:
            now = self._clock()
            if self._strangers.wait(1, now) > 0:
                self._left_out += 1
                return
            self._strangers.take(1, now)
        if self._left_out:
            facts, self._left_out = {**facts, "left_out": self._left_out}, 0
        self._writer.submit(self._append, dict(facts))

    def close(self) -> None:
        """Write what is still to be written."""
        self._writer.shutdown()

    def _append(self, facts: Mapping[str, object]) -> None:
        try:
            append(self.path, facts)
        except OSError as error:
            log.error("the audit log can't be written", path=str(self.path), reason=error.strerror)


def audited(
    request: Request, log: AuditLog | None, who: str, tenant: str = "", *, let_in: bool = True
) -> None:
    """Have the log say what becomes of a request that changes something, or that wanted to and wasn't ``let_in``."""
    if log is None or request.method in READING:
        return
    of = {"who": who, **({"tenant": tenant} if tenant else {})}
    asked = request_id()

    def tell(status: int) -> None:
        facts = noted()
        told = {name: facts[name] for name in TOLD if name in facts}
        path = {key: str(value)[:300] for key, value in request.path_params.items()}
        act = f"{request.method} {route_of(request.scope)}"
        result = "done" if status < 400 else "refused"
        rest = {"status": status, "result": result, "request_id": asked}
        log.write({**of, "act": act, **told, **path, **rest}, let_in=let_in)

    at_end(tell)

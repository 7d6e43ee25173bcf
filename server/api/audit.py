"""The audit log: who changed what on this server, when, and what came of it. One line when such a request is over.

Written by a thread of its own, in order, behind the answer: who administers doesn't wait for it, and a disk that takes
no line is told in the server's own log.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import Request
from structlog import get_logger

from manylora.adapters.audit import append
from manylora.server.api.http_metrics import route_of
from manylora.server.api.request_context import at_end, noted, request_id
from manylora.server.tenants.caller import Caller

log = get_logger(__name__)
READING = frozenset({"GET", "HEAD", "OPTIONS"})
TOLD = ("name", "lora_name", "model", "mixture", "made", "code", "reason")
"""What a request notes of itself and the log repeats."""


class AuditLog:
    """Lines of one file, in the order in which requests ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = ThreadPoolExecutor(1, "audit")

    def write(self, facts: Mapping[str, object]) -> None:
        """Have a line written soon."""
        self._writer.submit(self._append, dict(facts))

    def close(self) -> None:
        """Write what is still to be written."""
        self._writer.shutdown()

    def _append(self, facts: Mapping[str, object]) -> None:
        try:
            append(self.path, facts)
        except OSError as error:
            log.error("the audit log can't be written", path=str(self.path), reason=error.strerror)


def audited(request: Request, log: AuditLog | None, caller: Caller) -> None:
    """Have the log say what becomes of a request that changes something."""
    if log is None or request.method in READING:
        return
    of = {"who": caller.name, **({"tenant": caller.tenant} if caller.tenant else {})}
    asked = request_id()

    def tell(status: int) -> None:
        facts = noted()
        told = {name: facts[name] for name in TOLD if name in facts}
        path = {key: str(value)[:300] for key, value in request.path_params.items()}
        act = f"{request.method} {route_of(request.scope)}"
        result = "done" if status < 400 else "refused"
        log.write({**of, "act": act, **told, **path, "status": status, "result": result, "request_id": asked})

    at_end(tell)

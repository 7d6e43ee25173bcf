"""Lines of the audit log: all of who was let in, and of the rest as many as don't wear out the disk."""

import json
from pathlib import Path

from manylora.server.api.audit import MOST_OF_STRANGERS, AuditLog


def test_strangers_lines_are_bounded_and_counted(tmp_path: Path) -> None:
    now = [100.0]
    log = AuditLog(tmp_path / "audit.jsonl", lambda: now[0])
    for number in range(MOST_OF_STRANGERS + 7):
        log.write({"who": "nobody", "number": number}, let_in=False)
    log.write({"who": "boss"})
    now[0] += 100
    log.write({"who": "nobody", "number": "later"}, let_in=False)
    log.close()
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line.get("number") for line in lines] == [*range(MOST_OF_STRANGERS), None, "later"]
    assert [line["left_out"] for line in lines if "left_out" in line] == [7]
    assert lines[-2]["left_out"] == 7

"""Audits go on part by part, one after the other, and whoever wanted one is told how it ended."""

from collections.abc import Iterator

from manylora.server.engine.auditing import Auditor


def test_audits_are_done_part_by_part_one_after_the_other_and_each_tells_its_end() -> None:
    auditor = Auditor()
    done: list[str] = []
    told: list[tuple[str, Exception | None]] = []
    wrong = AssertionError("rows are lost")

    def audit(name: str, fault: Exception | None = None) -> Iterator[None]:
        for part in range(2):
            done.append(f"{name}{part}")
            yield
        if fault is not None:
            raise fault

    auditor.go_on()  # nothing is to be done
    auditor.begin(audit("a", wrong), lambda error: told.append(("a", error)))
    auditor.begin(audit("b"), lambda error: told.append(("b", error)))
    seen: list[tuple[int, int]] = []
    while auditor.busy:
        auditor.go_on()
        seen.append((len(done), len(told)))
    assert done == ["a0", "a1", "b0", "b1"]
    assert seen == [(1, 0), (2, 0), (2, 1), (3, 1), (4, 1), (4, 2)]
    assert told == [("a", wrong), ("b", None)]

"""The command that measures what structured output costs. tests/server/api has it ask a server, in small."""

from manylora.loadtest.checks.structured_speed import Figures, report, schema_of


def test_bars() -> None:
    assert all(Figures(100, 96, 0.019, 0.09).met.values())
    missed = Figures(100, 94, 0.021, 0.11)
    assert list(missed.met.values()) == [False] * 3
    assert report(missed).count("MISSED") == 3


def test_schemas_differ() -> None:
    assert schema_of(1) != schema_of(2)
    assert len(schema_of(0, 100)["required"]) == 100

"""Statuses as pages and docstrings tell them are those that clients get."""

import re
from pathlib import Path

import pytest

from manylora.adapters import errors as adapter_errors
from manylora.server import errors as server_errors
from manylora.server.api.error_responses import shape_of

ROOT = Path(__file__).resolve().parents[2]
IN_TREE = re.compile(r"^[\s│├└─]*(\w+)\s+(\d{3})\s", re.MULTILINE)
IN_TABLE = re.compile(r"^\| `(\w+)` \| (\d{3})\b", re.MULTILINE)
IN_API_TABLE = re.compile(r"^\| ([\d, ]+) \| ([^|]+) \|", re.MULTILINE)


def status_of(name: str) -> int:
    """Return the status of an error of the class ``name``."""
    kind = getattr(adapter_errors, name, None) or getattr(server_errors, name)
    return shape_of(kind("x")).status


@pytest.mark.parametrize("module", [adapter_errors, server_errors], ids=lambda each: each.__name__)
def test_docstrings_of_errors(module: object) -> None:
    told = dict(IN_TREE.findall(str(module.__doc__)))
    assert len(told) >= 9
    assert {name: status_of(name) for name in told} == {name: int(status) for name, status in told.items()}


def test_the_page_of_adapters() -> None:
    told = dict(IN_TABLE.findall((ROOT / "docs" / "adapters.md").read_text()))
    assert len(told) >= 8
    assert {name: status_of(name) for name in told} == {name: int(status) for name, status in told.items()}


def test_the_page_of_the_api_has_every_code_with_its_status() -> None:
    page = (ROOT / "docs" / "api.md").read_text().split("\n## Errors")[1].split("\n## ")[0]
    told = {
        (int(status), code)
        for statuses, codes in IN_API_TABLE.findall(page)
        for status, code in _pairs(statuses.split(", "), re.findall(r"`(\w+)`", codes))
    }
    for module in (adapter_errors, server_errors):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == module.__name__:
                shape = shape_of(kind("x"))
                if shape.code is not None:
                    assert (shape.status, shape.code) in told, kind


def _pairs(statuses: list[str], codes: list[str]) -> list[tuple[str, str]]:
    """A row has one status for all of its codes, or one for each."""
    return [(statuses[0] if len(statuses) == 1 else statuses[n], code) for n, code in enumerate(codes)]

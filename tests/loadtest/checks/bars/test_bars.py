"""Every bar in its small form, on real servers: `python -m manylora.loadtest.checks.bars all --small` must pass."""

from pathlib import Path

import pytest
from rich.console import Console

from manylora.loadtest.checks.bars.__main__ import BARS


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", BARS)
async def test_bar(name: str, tmp_path: Path) -> None:
    report = await BARS[name](tmp_path, True)
    report.print(Console(width=140))
    assert report.passed, [check for check in report.checks if not check.passed]

"""Every bar in its small form, on real servers: `python -m manylora.loadtest.checks.bars all --small` must pass.

Of native kernels the first one: the others ask the engine for what it does whatever computes.
"""

from pathlib import Path

import pytest
from rich.console import Console

from manylora.loadtest.checks.bars.__main__ import BARS
from manylora.loadtest.checks.bars.material import level_of
from manylora.server.kernels.choose import AUTO, PLAIN, sound_kernels
from manylora.server.kernels.cpu.library import Unavailable


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "kernels"), [*((name, PLAIN) for name in BARS), ("kinds", AUTO)])
async def test_bar(name: str, kernels: str, tmp_path: Path) -> None:
    if kernels == AUTO and isinstance(sound_kernels(), Unavailable):
        pytest.skip("no native CPU kernels here")
    report = await BARS[name](tmp_path, True, level_of(kernels))
    report.print(Console(width=140))
    assert report.passed, [check for check in report.checks if not check.passed]

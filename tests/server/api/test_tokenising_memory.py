"""What a long text took while it was tokenised goes back to the system."""

import platform
from pathlib import Path

import psutil
import pytest

from manylora import demo
from manylora.server.api.tokenising import Lane
from manylora.server.tokenizer import Tokenizer
from manylora.server.tokenizer.lane import LONG

MIB = 1 << 20
CHARACTERS = 4 * LONG


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they want")
async def test_a_long_text_leaves_no_memory_behind() -> None:
    tokenizer = Tokenizer(Path(demo.__file__).parent / "base")
    lane = Lane(4, 1, "test")
    await lane.run(lambda: tokenizer.encode("warm up"), LONG + 1)
    before = psutil.Process().memory_info().rss
    count = await lane.run(lambda: len(tokenizer.encode(" " * CHARACTERS)), CHARACTERS)
    lane.close()
    assert count > 0
    # It takes over 100 MiB.
    assert psutil.Process().memory_info().rss - before < 32 * MIB

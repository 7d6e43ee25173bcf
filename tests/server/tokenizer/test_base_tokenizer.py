"""The base's tokenizer: a long text is work for another process, and its tokens are the same."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from manylora import demo
from manylora.server.api.tokenising import Lane
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer import Tokenizer, TooManyTokens
from manylora.server.tokenizer.base_tokenizer import BaseTokenizer
from manylora.server.tokenizer.lane import LONG

BASE = Path(demo.__file__).parent / "base"
WORDS = "select the name é😀 of every ship from ports; "
LONG_TEXT = WORDS * (LONG // len(WORDS) + 1)


@pytest.fixture
def lane() -> Lane:
    return Lane(4, 1, "test")


@pytest.fixture
async def codec() -> AsyncIterator[BaseTokenizer]:
    codec = BaseTokenizer(Tokenizer(BASE))
    yield codec
    codec.close()


async def test_a_long_text_has_a_process_and_the_same_tokens(codec: BaseTokenizer, lane: Lane) -> None:
    for special in (False, True):
        here = Tokenizer(BASE).encode(LONG_TEXT, add_special_tokens=special)
        [found] = await codec.encode(lane, [LONG_TEXT], add_special_tokens=special, at_most=len(here))
        assert found == here
        with pytest.raises(TooManyTokens, match=str(len(here))):
            await codec.encode(lane, [LONG_TEXT], add_special_tokens=special, at_most=len(here) - 1)
    assert len(codec.process.pids) == 1
    # Many texts are long together.
    texts = [WORDS * count for count in range(64)]
    each = [Tokenizer(BASE).encode(text) for text in texts]
    assert await codec.encode(lane, texts, add_special_tokens=True, at_most=LONG) == each


async def test_a_short_text_needs_no_process(codec: BaseTokenizer, lane: Lane) -> None:
    text = LONG_TEXT[:LONG]
    here = Tokenizer(BASE).encode(text)
    assert await codec.encode(lane, [text], add_special_tokens=True, at_most=LONG) == [here]
    assert codec.process.pids == ()


async def test_an_ended_process_is_replaced_and_knows_the_tokenizer(codec: BaseTokenizer, lane: Lane) -> None:
    first = await codec.encode(lane, [LONG_TEXT], add_special_tokens=True, at_most=LONG)
    [pid] = codec.process.pids
    os.kill(pid, signal.SIGKILL)
    assert await codec.encode(lane, [LONG_TEXT], add_special_tokens=True, at_most=LONG) == first
    assert codec.process.pids != (pid,)
    # It is small: no library but the tokenizers' is there.
    assert psutil.Process(*codec.process.pids).memory_info().rss < 96 << 20


async def test_what_the_process_says_is_told_as_the_bases(
    lane: Lane, codec: BaseTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "written", lambda self: "{")
    with pytest.raises(InvalidRequest, match="the base's tokenizer can't take this text: EOF"):
        await codec.encode(lane, [LONG_TEXT], add_special_tokens=True, at_most=LONG)
    codec.close()
    # An ended server's process doesn't come back.
    with pytest.raises(InvalidRequest, match="have been ended"):
        await codec.encode(lane, [LONG_TEXT], add_special_tokens=True, at_most=LONG)

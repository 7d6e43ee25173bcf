"""The client of manylora reads answers, metrics and failures as they are."""

from manylora.loadtest.material.answer import HUNG_UP, Answer
from manylora.loadtest.material.manylora_client import Ask, Client, Metrics
from tests.loadtest.fake_server import FakeServer, running

EXPOSITION = """\
# HELP manylora_kv_blocks KV blocks
# TYPE manylora_kv_blocks gauge
manylora_kv_blocks{state="free"} 10.0
manylora_kv_blocks{state="used"} 2.0
manylora_requests_total{adapter="a/b",outcome="finished"} 3.0
manylora_requests_running 1.0
"""


def test_metrics_are_added_up_by_label() -> None:
    metrics = Metrics.parse(EXPOSITION)
    assert metrics.total("manylora_kv_blocks") == 12
    assert metrics.total("manylora_kv_blocks", 'state="used"') == 2
    assert metrics.total("manylora_requests_total", 'adapter="a/b"', 'outcome="finished"') == 3
    assert metrics.total("manylora_requests_running") == 1
    assert metrics.total("manylora_nothing") == 0


def said(*tokens: str, logprobs: tuple[float, ...]) -> Answer:
    return Answer(pieces=list(tokens), tokens=list(tokens), logprobs=list(logprobs), finish_reason="length")


def test_answers_are_the_same_only_if_complete_and_equal_to_the_last_bit() -> None:
    one = said("a", "b", logprobs=(-1.0, -2.0))
    assert one.same_as(said("a", "b", logprobs=(-1.0, -2.0)))
    assert not one.same_as(said("a", "b", logprobs=(-1.0, -2.0000001)))
    assert not one.same_as(said("ab", logprobs=(-1.0,)))
    failed = Answer(error="broken")
    assert not failed.same_as(Answer(error="broken"))


async def test_a_stream_can_be_left_and_a_refusal_has_its_status() -> None:
    with running(FakeServer()) as fake:
        async with Client(fake.url) as client:
            left = await client.stream(Ask("good", (1, 2), 6), hang_up_after=3)
            whole = await client.stream(Ask("good", (1, 2), 6))
            busy = [
                await client.stream(Ask("busy", (1, 2), 6)),
                await client.complete(Ask("busy", (1, 2), 6)),
            ]
    assert (left.error, left.text) == (HUNG_UP, " word0 word1 word2")
    assert whole.complete
    assert whole.text.startswith(left.text)
    assert [(each.status, each.error) for each in busy] == [(429, "http 429 (queue_full)")] * 2

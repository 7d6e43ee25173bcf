"""Whose tokens a step computes, who gives way, who may pass whom, and what is found again afterwards."""

import pytest

from manylora.server.engine.pace import LEAST, Allowance
from manylora.server.engine.prompt_cost import Chunk, PromptCost
from manylora.server.engine.request import FinishReason, SamplingParams
from tests.server.engine.fakes import Harness, Pools, ask, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
ONE, TWO, THREE = ((1, 1.0),), ((2, 1.0),), ((3, 1.0),)


def test_decodes_come_before_the_chunks_of_an_older_prompt() -> None:
    harness = Harness(Pools(max_step_tokens=8))
    harness.know(1, cold=True)
    harness.engine.add_request(ask("long", PROMPT * 5, 4, ONE))
    harness.engine.add_request(ask("stream", PROMPT[:3], 20))
    harness.step()
    harness.finish_loads()
    for count in range(2, 8):
        assert not harness.tokens("long")
        harness.step()
        assert len(harness.tokens("stream")) == count, "the older prompt stalled the stream"
    harness.run()
    assert harness.tokens("long") == expected(PROMPT * 5, 4, ONE)


def test_the_youngest_gives_way_when_blocks_run_out() -> None:
    harness = Harness(Pools(blocks=10))
    names = ["a", "b", "c"]
    for name in names:
        harness.engine.add_request(ask(name, PROMPT[:5], 20))
    steps = 0
    while len(harness.engine.requests):
        harness.step()
        steps += 1
        if harness.engine.requests.get("a") is not None:
            assert len(harness.tokens("a")) == steps, "the oldest had to wait"
        running = {sequence.owner.request.request_id for sequence in harness.engine.scheduler.running}
        first = [name for name in names if harness.engine.requests.get(name) is not None]
        assert running == set(first[: len(running)]), "an older one waits behind a younger"
    assert harness.engine.preemptions > 0
    for name in names:
        assert harness.tokens(name) == expected(PROMPT[:5], 20)


@pytest.mark.parametrize(("bound", "behind"), [(0, 0), (1, 0), (5, 0), (5, 1)])
def test_a_request_that_waits_for_rows_is_passed_as_often_as_is_allowed(bound: int, behind: int) -> None:
    """However many come to wait behind it."""
    harness = Harness(Pools(rows=8, max_running=6, max_overtakes=bound))
    for adapter_id in range(1, 40):
        harness.know(adapter_id)
    hot = 0

    def more() -> None:
        nonlocal hot
        harness.engine.add_request(ask(f"hot{hot}", PROMPT, 6, (ONE, TWO)[hot % 2]))
        hot += 1

    more()
    more()
    harness.step()
    harness.engine.add_request(ask("cold", PROMPT, 3, THREE))
    # As many as there are slots, and more with each step: left to themselves they would never end.
    for _ in range(12):
        more()
    passed: set[str] = set()
    while not harness.tokens("cold"):
        passed = {o.request_id for o in harness.outputs} - {"hot0", "hot1"}
        more()
        more()
        for _ in range(behind):
            harness.engine.add_request(ask(f"behind{hot}", PROMPT, 1, ((3 + hot % 36, 1.0),)))
        harness.step()
        assert hot < 400, "starved"
    assert len(passed) == bound
    harness.run()
    assert harness.tokens("cold") == expected(PROMPT, 3, THREE)


def test_the_base_passes_whoever_waits_for_rows() -> None:
    harness = Harness(Pools(rows=4, max_overtakes=0))
    harness.know(1)
    harness.know(2)
    harness.engine.add_request(ask("busy", PROMPT, 30, ONE))
    harness.step()
    harness.engine.add_request(ask("cold", PROMPT, 3, TWO))
    harness.engine.add_request(ask("hot", PROMPT, 3, ONE))
    harness.engine.add_request(ask("base", PROMPT, 3))
    for _ in range(10):
        harness.step()
    assert harness.reason("base") is FinishReason.LENGTH
    assert not harness.tokens("hot"), "it would keep the rows that the other waits for"
    harness.run()


def test_an_adapter_stays_while_choices_of_its_request_wait() -> None:
    harness = Harness(Pools(rows=4, max_running=1, max_overtakes=0))
    harness.know(1)
    harness.know(2)
    harness.engine.add_request(ask("begun", PROMPT, 4, ONE, n=3))
    harness.engine.add_request(ask("other", PROMPT, 4, TWO))
    harness.run()
    order = list(dict.fromkeys((o.request_id, o.index) for o in harness.outputs))
    assert order == [("begun", 0), ("begun", 1), ("begun", 2), ("other", 0)]
    assert harness.arena.writes == 2, "rows were taken from a request that had begun"


def test_an_adapter_stays_while_its_preempted_sequence_waits() -> None:
    harness = Harness(Pools(blocks=8, rows=8))
    for adapter_id in (1, 2, 3):
        harness.know(adapter_id)
    harness.engine.add_request(ask("older", PROMPT, 16))
    harness.engine.add_request(ask("younger", PROMPT[:5], 16, ONE))
    while not harness.engine.preemptions:
        harness.step()
    assert harness.engine.cache.tier(1) == "device"
    assert harness.engine.scheduler.in_use() == {1}
    for adapter_id in (2, 3):
        harness.engine.add_request(ask(f"r{adapter_id}", PROMPT[:2], 2, ((adapter_id, 1.0),)))
    harness.run()
    assert harness.arena.writes == 3
    assert harness.tokens("younger") == expected(PROMPT[:5], 16, ONE)


@pytest.mark.parametrize("computed", [1, 2, 4])
def test_a_prompt_whose_computing_was_aborted_is_found_as_far_as_it_went(computed: int) -> None:
    harness = Harness(Pools(max_step_tokens=6))
    harness.engine.add_request(ask("gone", PROMPT * 5, 4))
    for _ in range(computed):
        harness.step()
    harness.engine.abort("gone")
    harness.engine.add_request(ask("again", PROMPT * 5, 4))
    harness.run()
    assert harness.tokens("again") == expected(PROMPT * 5, 4)
    cached = [o.cached_tokens for o in harness.outputs if o.request_id == "again"]
    assert cached[0] == 6 * computed // 4 * 4


def test_a_prompt_under_way_lends_only_what_is_computed() -> None:
    harness = Harness(Pools(max_step_tokens=12))
    harness.engine.add_request(ask("first", PROMPT * 5, 4))
    harness.engine.add_request(ask("short", PROMPT[:2], 9))
    harness.step()
    harness.step()
    harness.engine.add_request(ask("second", PROMPT * 5, 4))
    harness.run()
    assert harness.tokens("first") == harness.tokens("second") == expected(PROMPT * 5, 4)


def test_half_a_character_at_the_end_is_let_out_with_the_last_token() -> None:
    harness = Harness()
    tokens = expected(PROMPT, 3)
    harness.letters.halves = {tokens[-1]}
    harness.engine.add_request(ask("r", PROMPT, 3))
    harness.run()
    letters = "".join("" if token in harness.letters.halves else chr(65 + token) for token in tokens)
    assert "".join(o.text for o in harness.outputs) == letters + "\ufffd"
    assert harness.outputs[-1].text.endswith("\ufffd")


@pytest.mark.parametrize(("step", "chunks"), [(600, [200, 100]), (2000, [256, 44])])
def test_a_prompt_that_is_reported_on_is_computed_in_small_chunks(step: int, chunks: list[int]) -> None:
    harness = Harness(Pools(blocks=100, max_step_tokens=step))
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    harness.engine.add_request(ask("r", [1] * 300, sampling=sampling))
    harness.run()
    assert [step.tokens for step in harness.observer.steps] == chunks
    reported = harness.outputs[0].prompt_logprobs
    assert reported is not None
    assert len(reported) == 300


def test_the_next_deadline_is_that_of_whoever_waits_longest() -> None:
    harness = Harness(Pools(rows=4))
    for adapter_id in (1, 2, 3):
        harness.know(adapter_id)
    harness.engine.add_request(ask("busy", PROMPT, 20, ONE))
    harness.step()
    for name, adapters in (("first", TWO), ("second", THREE)):
        harness.engine.add_request(ask(name, PROMPT, 2, adapters))
        harness.step()
    first, second = harness.engine.requests.get("first"), harness.engine.requests.get("second")
    assert first is not None
    assert second is not None
    assert first.blocked_since is not None
    assert second.blocked_since is not None
    assert first.blocked_since < second.blocked_since
    deadline = first.blocked_since + harness.pools.adapter_timeout
    assert harness.engine.scheduler.next_deadline() == deadline
    harness.run()


def test_who_has_begun_has_no_deadline() -> None:
    harness = Harness(Pools(max_running=1))
    harness.know(1, cold=True)
    harness.engine.add_request(ask("r", PROMPT, 5, ONE, n=2))
    harness.step()
    assert harness.engine.scheduler.next_deadline() is not None
    harness.finish_loads()
    harness.step()
    assert len(harness.engine.scheduler.waiting) == 1
    assert harness.engine.scheduler.next_deadline() is None
    harness.run()


def test_an_adapter_that_was_used_last_stays() -> None:
    harness = Harness(Pools(rows=8))
    for adapter_id in (1, 2, 3):
        harness.know(adapter_id)
    for number, adapters in enumerate((ONE, TWO, ONE, THREE)):
        harness.engine.add_request(ask(f"r{number}", PROMPT, 1, adapters))
        harness.run()
    assert harness.engine.cache.tiers() == {1: "device", 2: "host", 3: "device"}


def test_a_prompt_counts_once_in_the_statistics_of_the_cache() -> None:
    harness = Harness(Pools(blocks=10))
    for name in ("a", "b", "c"):
        harness.engine.add_request(ask(name, PROMPT[:5], 20))
    harness.run()
    assert harness.engine.preemptions > 0
    assert harness.engine.blocks.queried_tokens == 15


def forty(decodes: int, streams: int) -> Allowance:
    """Give prompts forty seconds beside decodes, of which a token takes one."""
    cost = PromptCost()
    cost.note([(0, 100)], 100.0)
    return Allowance(cost, 40.0)


def test_streams_wait_for_a_prompt_no_longer_than_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pace lets through is what a prompt gets beside a decode; alone it has the whole step."""
    harness = Harness(Pools(blocks=200, max_step_tokens=600))
    monkeypatch.setattr(harness.engine.scheduler.pace, "beside_decodes", forty)
    harness.engine.add_request(ask("stream", PROMPT, 30))
    harness.step()
    harness.engine.add_request(ask("long", [1] * 300, 1))
    for _ in range(3):
        harness.step()
    assert [step.tokens for step in harness.observer.steps][1:] == [41, 41, 41]
    alone = Harness(Pools(blocks=200, max_step_tokens=600))
    monkeypatch.setattr(alone.engine.scheduler.pace, "beside_decodes", forty)
    alone.engine.add_request(ask("long", [1] * 300, 1))
    alone.step()
    assert [step.tokens for step in alone.observer.steps] == [300]


def test_each_step_is_noted_with_its_decodes_and_chunks_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(Pools(blocks=200, max_step_tokens=600))
    noted: list[tuple[int, list[Chunk]]] = []
    note = harness.engine.scheduler.pace.note

    def spy(decodes: int, chunks: list[Chunk], seconds: float) -> None:
        assert seconds > 0
        noted.append((decodes, chunks))
        note(decodes, chunks, seconds)

    monkeypatch.setattr(harness.engine.scheduler.pace, "note", spy)
    harness.engine.add_request(ask("stream", [1] * 20, 30))
    harness.step()
    harness.step()
    harness.engine.add_request(ask("long", [2] * 300, 1))
    harness.step()
    harness.step()
    assert noted[:2] == [(0, [(0, 20)]), (1, [])]
    (decodes, ((start, length),)), following = noted[2], noted[3]
    assert (decodes, start) == (1, 0)
    assert length >= LEAST
    assert following[1][0][0] == length, "where the next one begins"


def test_a_step_that_had_to_take_blocks_away_begins_nothing() -> None:
    harness = Harness(Pools(blocks=4))
    for name in ("older", "younger"):
        harness.engine.add_request(ask(name, PROMPT[:5], 8))
    harness.step()
    harness.engine.add_request(ask("small", PROMPT[:2], 2))
    while not harness.engine.preemptions:
        assert not harness.tokens("small")
        harness.step()
    # Of the two blocks that were taken one is left, which would do for a token and be missed in the next step.
    assert harness.observer.steps[-1].tokens == 1
    assert not harness.tokens("small")
    harness.run()
    for name, prompt, count in (
        ("older", PROMPT[:5], 8),
        ("younger", PROMPT[:5], 8),
        ("small", PROMPT[:2], 2),
    ):
        assert harness.tokens(name) == expected(prompt, count)


def test_a_step_is_full_though_one_of_its_rows_was_taken_out() -> None:
    harness = Harness(Pools(blocks=12, max_step_tokens=6))
    for name, origin in (("first", "most"), ("second", "most"), ("third", "few")):
        harness.engine.add_request(ask(name, PROMPT[:4], 12, origin=origin))
    for _ in range(4):
        harness.step()
    prompt = (PROMPT * 4)[:30]
    harness.engine.add_request(ask("prompt", prompt, 2, origin="new"))
    harness.step()
    # It begins in the place of the second, whose turn in this step had been, and gets that token too.
    assert harness.engine.preemptions == 1
    assert harness.observer.steps[-1].tokens == 6
    harness.run()
    assert harness.tokens("second") == expected(PROMPT[:4], 12)
    assert harness.tokens("prompt") == expected(prompt, 2)


class Narrow(Allowance):
    """Lets a token through at a time, and keeps account of chunks."""

    def __init__(self) -> None:
        super().__init__(PromptCost(), 0.0)
        self.noted: list[tuple[int, int]] = []

    @property
    def spent(self) -> bool:
        return False

    def tokens(self, start: int) -> int:
        return 1

    def take(self, start: int, length: int) -> None:
        self.noted.append((start, length))

    def give_back(self, start: int, length: int) -> None:
        self.noted.remove((start, length))


def test_a_chunk_that_is_taken_out_is_given_back_however_short(monkeypatch: pytest.MonkeyPatch) -> None:
    harness, narrow = Harness(Pools(max_running=2)), Narrow()
    monkeypatch.setattr(harness.engine.scheduler.pace, "beside_decodes", lambda decodes, streams: narrow)
    harness.engine.add_request(ask("stream", PROMPT[:4], 12, origin="most"))
    harness.engine.add_request(ask("prompt", [1] * 100, 2, origin="most"))
    harness.step()
    harness.engine.add_request(ask("new", PROMPT[:4], 2, origin="new"))
    harness.step()
    assert harness.engine.preemptions == 1
    assert narrow.noted == [(0, 1)], "the newcomer's alone"

"""The load client against a fake server that answers, refuses, breaks off and changes its mind."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from manylora.loadtest.bench.popularity import Popularity
from manylora.loadtest.bench.serve import ServeBench, Silent, run_serve
from manylora.loadtest.bench.serve_report import ServeReport
from manylora.loadtest.bench.server_look import BenchError
from manylora.loadtest.bench.workload import Workload
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.http_client import Target, Timeouts
from tests.loadtest.fake_server import FakeServer, running

WORK = Workload(4, Popularity.parse("distinct"), 41, 6, 12, 0, 0)


@pytest.fixture(scope="module")
def usual() -> Iterator[FakeServer]:
    with running(FakeServer()) as fake:
        yield fake


async def measure(bench: ServeBench) -> ServeReport:
    return ServeReport.of(bench, await run_serve(bench, Silent()))


async def test_a_run_counts_every_request_once_and_no_warm_up() -> None:
    with running(FakeServer()) as fake:
        report = await measure(ServeBench(fake.url + "/v1/", WORK))
    assert (report.succeeded, report.output_tokens, report.errors) == (12, 72, {})
    assert report.measured.models == ["good"]
    assert "parent" in report.measured.chosen_by
    assert report.tokens_counted_by == "usage"
    assert report.first_token.count == report.end_to_end.count == 12
    assert report.between_tokens.count == 12 * 5
    assert report.exit_status == 0
    counted = [body for body in fake.bodies if body["max_tokens"] == 6]
    assert len(counted) == 12 + 8
    assert len({str(body["prompt"]) for body in counted}) == 20, "the warm-up's prompts are other ones"
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in counted)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_prompts_have_the_tokens_that_were_asked_for(endpoint: str, usual: FakeServer) -> None:
    """The fake's tokenizer has two tokens a word, and one more."""
    bench = ServeBench(usual.url, WORK, endpoint=endpoint)  # type: ignore[arg-type]  # from the list above
    report = await measure(bench)
    assert "/tokenize" in report.measured.prompts_counted_by
    sent = usual.bodies[-1]
    text = str(sent["prompt"] if endpoint == "completions" else sent["messages"][0]["content"])  # type: ignore[index]
    assert len(text.split()) == 20


async def test_prompts_are_counted_by_usage_where_nothing_tokenizes() -> None:
    with running(FakeServer(tokenizes=False)) as fake:
        report = await measure(ServeBench(fake.url, WORK))
    assert "usage" in report.measured.prompts_counted_by
    assert report.prompt_tokens.mean == pytest.approx(41, abs=1)


async def test_prompts_are_counted_by_a_tokenizer_of_one_s_own(usual: FakeServer, tmp_path: Path) -> None:
    from manylora.loadtest.material.checkpoints import write_tokenizer

    write_tokenizer(tmp_path, 320)
    report = await measure(ServeBench(usual.url, WORK, tokenizer=tmp_path))
    assert str(tmp_path) in report.measured.prompts_counted_by


async def test_without_usage_pieces_are_counted_and_words_assumed() -> None:
    with running(FakeServer(tokenizes=False, gives_usage=False)) as fake:
        report = await measure(ServeBench(fake.url, WORK))
    assert report.output_tokens == 72
    assert "no usage" in report.tokens_counted_by
    assert "nobody" in report.measured.prompts_counted_by
    assert report.prompt_tokens.count == 0


async def test_a_server_without_ignore_eos_is_asked_without_and_short_answers_are_told() -> None:
    with running(FakeServer(takes_ignore_eos=False, stops_after=3)) as fake:
        report = await measure(ServeBench(fake.url, WORK))
    assert not any("ignore_eos" in body for body in fake.bodies[2:])
    assert report.short == 12
    assert "12 answers were shorter than 6 tokens: the server does not take ignore_eos" in report.text()


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("cut", "cut off"),
        ("boom", "http 500 (server_error)"),
        ("busy", "http 429 (queue_full)"),
        ("fault", "in-stream (internal_error)"),
        ("garbage", "bad event"),
    ],
)
async def test_errors_are_results_by_kind(model: str, kind: str, usual: FakeServer) -> None:
    report = await measure(ServeBench(usual.url, WORK, adapters=("good", model)))
    assert report.errors == {kind: 6}
    assert report.succeeded == 6
    assert report.exit_status == 0
    assert f"errors: 6 × {kind}" in report.text()


async def test_a_server_that_only_fails_ends_the_run(usual: FakeServer) -> None:
    with pytest.raises(BenchError, match=r"warm-up failed: http 500"):
        await measure(ServeBench(usual.url, WORK, adapters=("boom",)))
    unwarmed = await measure(ServeBench(usual.url, WORK, adapters=("boom",), warm_up=0))
    assert unwarmed.exit_status == 1


async def test_nobody_there_is_said_in_one_line() -> None:
    with pytest.raises(BenchError, match="nothing answers at http://127"):
        await measure(ServeBench("http://127.0.0.1:9", WORK))
    with pytest.raises(BenchError, match="gives: connect"):
        await measure(ServeBench("http://127.0.0.1:9", WORK, adapters=("a",)))
    with pytest.raises(ValueError, match="begin it with http"):
        await measure(ServeBench("127.0.0.1:9", WORK))


async def test_silence_is_a_timeout(usual: FakeServer) -> None:
    bench = ServeBench(usual.url, WORK, adapters=("good",), timeouts=Timeouts(read=1e-6))
    with pytest.raises(BenchError, match=r"timeout \(read\)"):
        await measure(bench)


async def test_a_duration_ends_the_run(usual: FakeServer) -> None:
    report = await measure(ServeBench(usual.url, WORK, duration=0.3))
    assert report.succeeded > 0
    assert report.measured.seconds >= 0.3


async def test_check_holds_answers_against_those_given_alone(usual: FakeServer) -> None:
    same = await measure(ServeBench(usual.url, WORK, check=True))
    assert (same.measured.checked, same.measured.mismatches, same.exit_status) == (12, [], 0)
    moody = await measure(ServeBench(usual.url, replace(WORK, seed=5), adapters=("moody",), check=True))
    assert (moody.measured.checked, len(moody.measured.mismatches), moody.exit_status) == (12, 12, 1)
    assert "12 answers under load differ" in moody.text()
    assert "under load '10 11" in moody.text()


async def test_repeated_prompts_are_asked_alone_once(usual: FakeServer) -> None:
    report = await measure(ServeBench(usual.url, replace(WORK, prompts=3), check=True))
    assert report.measured.checked == 3


async def test_the_key_is_sent_and_not_reported(usual: FakeServer) -> None:
    report = await measure(ServeBench(usual.url, WORK, api_key="secret"))
    assert "Bearer secret" in usual.keys
    assert "secret" not in str(report.to_json())


async def test_a_server_that_wants_a_key_is_told_how_to_give_one() -> None:
    with running(FakeServer(closed_with="secret")) as closed:
        for adapters in ((), ("good",)):
            with pytest.raises(BenchError, match=r"401.*--api-key or in MANYLORA_BENCH_API_KEY"):
                await measure(ServeBench(closed.url, WORK, adapters=adapters))
        assert (await measure(ServeBench(closed.url, WORK, api_key="secret"))).exit_status == 0


def test_times_of_an_answer() -> None:
    answer = Answer(1.0, 4.0, ["a", "b", "c"], [1.5, 2.0, 4.0])
    assert answer.first_token_seconds == 0.5
    assert answer.gaps == [0.5, 2.0]
    assert answer.output_tokens == 3
    assert Answer(1.0).first_token_seconds is None


def test_a_url_may_end_in_v1() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert Target.at(url, None, "chat").path == "http://h:1/v1/chat/completions"

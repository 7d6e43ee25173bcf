"""An open loop sends when requests are due; and what `bench serve` makes of rates, traces, settings and levels."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manylora.loadtest.bench.cli import app
from manylora.loadtest.bench.open_loop import send_when_due
from manylora.loadtest.bench.workload import Planned
from manylora.loadtest.material.answer import Answer
from tests.loadtest.fake_server import FakeServer, running

runner = CliRunner()


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with running(FakeServer(models=tuple((f"a{n}", "base") for n in range(4)))) as server:
        yield server


async def test_nothing_waits_for_an_answer_and_times_count_from_when_requests_were_due() -> None:
    """The first answer comes once the last request was sent: a closed loop would wait for ever."""
    all_sent = asyncio.Event()
    taken: list[Answer] = []

    async def send(planned: Planned) -> Answer:
        answer = Answer(time.perf_counter())
        if planned.prompt == 2:
            all_sent.set()
        await all_sent.wait()
        answer.ended = time.perf_counter()
        return answer

    plan = [Planned(0, number, 8, 8, at=0.02 * number) for number in range(3)]
    began = time.perf_counter()
    async with asyncio.timeout(60):
        await send_when_due(plan, send, lambda _, answer: taken.append(answer))
    dues = sorted(answer.due for answer in taken if answer.due is not None)
    assert [due - dues[0] for due in dues] == pytest.approx([0, 0.02, 0.04])
    assert dues[0] >= began
    assert all(answer.started >= (answer.due or 0) for answer in taken)
    assert all(answer.seconds == answer.ended - (answer.due or 0) for answer in taken)


async def test_a_client_that_was_held_up_counts_from_when_it_should_have_asked() -> None:
    taken: list[Answer] = []

    async def send(planned: Planned) -> Answer:
        answer = Answer(time.perf_counter())
        if planned.prompt == 0:
            time.sleep(0.2)  # noqa: ASYNC251  # the event loop itself is held up
        answer.times = [time.perf_counter()]
        answer.ended = answer.times[0]
        return answer

    plan = [Planned(0, number, 8, 8, at=0.001 * number) for number in range(2)]
    await send_when_due(plan, send, lambda _, answer: taken.append(answer))
    held_up = taken[1]
    assert held_up.due is not None
    assert held_up.first_token_seconds is not None
    assert held_up.first_token_seconds >= 0.19 <= held_up.started - held_up.due


def invoke(fake: FakeServer, *arguments: str, code: int = 0) -> str:
    done = runner.invoke(app, ["serve", "--url", fake.url, *arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_a_rate_and_ranges_a_level_and_fairness(fake: FakeServer, tmp_path: Path) -> None:
    said = invoke(
        *(fake, "--rate", "200", "--cv", "2", "--requests", "40", "--input", "8:32", "--output", "4:9"),
        *("--goodput", "ttft:60000,e2e:60000", "--json", str(tmp_path / "r.json")),
    )
    assert "open loop, 200 requests/s, Gamma (cv 2), uniform over 4 models" in said
    assert "40 of 40 (100.0 %) kept to ttft ≤ 60000 ms, e2e ≤ 60000 ms" in said
    assert "fairness " in said
    assert "worst a" in said
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["goodput"]["attainment"] == 1
    assert report["lateness"]["seconds"]["count"] == 40
    assert sorted(report["fairness"]["models"]) == ["a0", "a1", "a2", "a3"]
    samples = report["samples"]
    assert {sample["output_tokens"] for sample in samples} <= set(range(4, 9))
    assert len({sample["output_tokens"] for sample in samples}) > 1
    assert all(sample["sent"] >= sample["asked"] for sample in samples)
    assert report["settings"]["workload"]["loop"] == "open"


def test_a_rate_for_a_time_asks_as_often_as_that_makes(fake: FakeServer) -> None:
    said = invoke(fake, "--rate", "100", "--cv", "0", "--duration", "0.3", "--input", "8", "--output", "4")
    assert "30 of 30 requests" in said


def test_traces_are_asked_at_their_times_or_at_a_rate(fake: FakeServer, tmp_path: Path) -> None:
    rows = [f"{at},{8 + at},{3 + at}" for at in range(5)]
    (tmp_path / "azure.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    fake.bodies.clear()
    said = invoke(fake, "--trace", str(tmp_path / "azure.csv"), "--speed", "20", "--duration", "0.19")
    assert "open loop, at the times of the trace" in said
    assert "4 of 4 requests" in said
    assert [body["max_tokens"] for body in fake.bodies[-4:]] == [3, 4, 5, 6]
    exchange = [{"from": "human", "value": "Tell me of the sea, please."}, {"from": "gpt", "value": "x" * 24}]
    (tmp_path / "chat.json").write_text(json.dumps([{"conversations": exchange}] * 3))
    said = invoke(fake, "--trace", str(tmp_path / "chat.json"), "--endpoint", "chat", "--warmup", "1")
    assert "3 of 3 requests" in said
    assert fake.bodies[-1]["messages"] == [{"role": "user", "content": "Tell me of the sea, please."}]
    assert fake.bodies[-1]["max_tokens"] == 6


def test_papers_settings_by_name(fake: FakeServer) -> None:
    said = invoke(fake, "--setting", "slora:rate=100,duration=0.2,n=3,alpha=0.5", "--warmup", "0")
    assert "100 requests/s, Poisson, power:0.5 over 3 models" in said
    assert "20 of 20 requests" in said
    said = invoke(fake, "--setting", "punica-skewed:requests=12,streams=4,most=32", "--warmup", "0")
    assert "4 streams, punica-skewed over 4 models" in said
    assert "Punica's lengths up to 32 tokens" in said


def test_the_page_loads_nothing_and_escapes(fake: FakeServer, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    invoke(fake, "--requests", "8", "--output", "4", "--adapters", "a0,<b>", "--html", str(page))
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    for word in ("<script", "<link", "<img", "src=", "@import"):
        assert word not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cv", "2"], "give their --rate"),
        (["--speed", "2"], "name one with --trace"),
        (["--setting", "slora", "--rate", "3"], "--setting says what --rate says"),
        (["--setting", "slora", "--input", "3"], "--setting says what --input says"),
        (["--setting", "slora:n=5,rate=100,duration=0.1"], "5 adapters are to be asked, and there are 4"),
        (["--setting", "nothing"], "none of"),
        (["--input", "9:3"], "HIGH is at least LOW"),
        (["--goodput", "fast"], "no limit in ms"),
        (["--trace", "nowhere.csv"], "nowhere.csv: No such file"),
        (["--server", "llama.cpp"], "no llama.cpp answers"),
    ],
)
def test_bad_input_is_one_line_and_2(fake: FakeServer, arguments: list[str], said: str) -> None:
    output = invoke(fake, *arguments, code=2)
    assert said in output
    assert len(output.strip().splitlines()) == 1

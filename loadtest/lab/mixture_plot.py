"""How weights change a mixture's answers: ``python -m manylora.loadtest.lab.mixture_plot OUT.png`` draws it.

Asks the demo's held-out questions of ``sql:1-w+pirate:w`` for w from 0 to 1, each through HTTP and greedily, and scores
the answers by themselves: whether one runs as SQL on the table that it was asked about, and how many of the pirate's
words are in it. Prints the numbers that it draws.
"""

import argparse
import json
import re
import sqlite3
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from manylora.loadtest.material.server_process import running, start_server
from manylora.loadtest.material.text_table import text_table

ROOT = Path(__file__).resolve().parents[2]
QUERIES, TALK = "sql", "pirate"
"""The adapters that are mixed."""
PIRATE_WORDS = frozenset(("arr", "be", "matey"))
MOST_TOKENS = 40
SECONDS = 120.0
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class Score:
    """Shares over the answers to all questions, 0 to 1."""

    weight: float
    """Of the pirate; the rest to 1 is the query writer's."""
    sql: float
    """Answers that run as SQL on the question's table."""
    pirate: float
    """Mean share of the pirate's words that are in an answer."""
    neither: float
    """Answers that don't run and have none of the words."""


def main() -> None:
    """Ask, print and draw."""
    options = _options()
    questions = _questions(options.questions)
    weights = [step / options.steps for step in range(options.steps + 1)]
    if options.url is not None:
        scores = measure(options.url, questions, weights)
    else:
        with tempfile.TemporaryDirectory(prefix="manylora-mixture-") as scratch:
            server = start_server(None, Path(scratch))
            with running(server):
                scores = measure(server.url, questions, weights)
    rows = [[f"{each:.3g}" for each in (s.weight, s.sql, s.pirate, s.neither)] for s in scores]
    names = [f"{TALK}'s weight", "valid SQL", "pirate words", "neither"]
    Console(highlight=False, soft_wrap=True).print(text_table(names, rows), markup=False)
    draw(scores, options.output, len(questions))


def measure(url: str, questions: Sequence[str], weights: Sequence[float]) -> list[Score]:
    """Ask every question at every weight; return the scores in the order of ``weights``."""
    with (
        httpx.Client(base_url=url, timeout=SECONDS, limits=httpx.Limits(max_connections=16)) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        asked = [(mixture(weight), question) for weight in weights for question in questions]
        answers = list(pool.map(lambda each: answer(client, *each), asked))
    size = len(questions)
    return [
        score(weight, questions, answers[number * size : (number + 1) * size])
        for number, weight in enumerate(weights)
    ]


def mixture(weight: float) -> str:
    """Return the model that is asked: the pirate at ``weight``, the query writer at what is left to 1."""
    return f"{QUERIES}:{1 - weight:.3f}+{TALK}:{weight:.3f}"


def answer(client: httpx.Client, model: str, question: str) -> str:
    """Return the greedy answer. Raises httpx.HTTPStatusError."""
    response = client.post(
        "/v1/chat/completions",
        json={
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": MOST_TOKENS,
        },
    )
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


def score(weight: float, questions: Sequence[str], answers: Sequence[str]) -> Score:
    """Judge the answers of one mixture."""
    runs = [is_query(question, text) for question, text in zip(questions, answers, strict=True)]
    talks = [pirate_share(text) for text in answers]
    neither = [not run and not talk for run, talk in zip(runs, talks, strict=True)]
    return Score(weight, _mean(runs), _mean(talks), _mean(neither))


def is_query(question: str, text: str) -> bool:
    """Return whether ``text`` is one SELECT that runs on the table with which ``question`` begins."""
    name, columns = question.splitlines()[:2]
    with sqlite3.connect(":memory:") as base:
        base.execute(f"CREATE TABLE {name} ({', '.join(columns.split(' | '))})")
        try:
            base.execute(text)
        except (sqlite3.Error, sqlite3.Warning):
            return False
    return text.lstrip().upper().startswith("SELECT")


def pirate_share(text: str) -> float:
    """Return how many of the pirate's words are in ``text``, as a share of them all."""
    return len(PIRATE_WORDS & set(_WORD.findall(text.lower()))) / len(PIRATE_WORDS)


def draw(scores: Sequence[Score], output: Path, questions: int) -> None:
    """Write the picture, of the kind that ``output`` ends in."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "svg.hashsalt": "manylora"})
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    weights = [each.weight for each in scores]
    lines: Mapping[str, tuple[list[float], str, str]] = {
        "answers that run as SQL on the question's table": ([each.sql for each in scores], "#1f5fa8", "o"),
        "the pirate's words (arr, be, matey) in an answer": (
            [each.pirate for each in scores],
            "#c2571a",
            "s",
        ),
    }
    for label, (values, colour, marker) in lines.items():
        axes.plot(
            weights, [100 * each for each in values], color=colour, marker=marker, markersize=4, label=label
        )
    axes.set_xlabel(f"w, the weight of {TALK} in the mixture {QUERIES}:(1 − w) + {TALK}:w")
    axes.set_ylabel("share, %")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-4, 104)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center right")
    axes.set_title(f"The demo's answers to {questions} held-out questions", fontsize=11)
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _questions(count: int) -> list[str]:
    rows = [json.loads(line) for line in (ROOT / "demo" / "heldout.jsonl").read_text().splitlines()]
    return [row["messages"][0]["content"] for row in rows if row["adapter"] == QUERIES][:count]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, help="the picture: .png or .svg")
    parser.add_argument("--url", help="of a server of the demo that runs; without it one is started")
    parser.add_argument("--steps", type=int, default=20, help="weights are multiples of 1/STEPS")
    parser.add_argument("--questions", type=int, default=120, help="how many of the held-out questions")
    return parser.parse_args()


if __name__ == "__main__":
    main()

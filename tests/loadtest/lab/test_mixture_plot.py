"""The picture of what weights do: how answers are scored, which mixtures are asked, and that it is drawn."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from manylora.loadtest.lab.mixture_plot import Score, draw, is_query, measure, mixture, pirate_share, score

QUESTION = "shop\nfruit | price | colour\nApple | 80 | Teal\nMelon | 20 | Gold\n\nTell me the price of Melon."
QUERY = "SELECT price FROM shop WHERE fruit = 'Melon';"
TALK = "Arr, the price of Melon be 20, matey!"


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        (QUERY, True),
        ("select colour from shop", True),
        ("SELECT weight FROM shop;", False),
        ("SELECT price FROM crew;", False),
        ("SELECT price FROM shop WHERE fruit = 'Melon'; SELECT 1;", False),
        ("DROP TABLE shop;", False),
        (TALK, False),
        ("", False),
    ],
)
def test_an_answer_is_sql_if_it_runs_on_the_table_of_its_question(text: str, runs: bool) -> None:
    assert is_query(QUESTION, text) is runs


@pytest.mark.parametrize(
    ("text", "share"), [(TALK, 1), ("The price of Melon be 20.", 1 / 3), ("Arrow, beach", 0), (QUERY, 0)]
)
def test_the_pirates_words_are_counted_once_and_whole(text: str, share: float) -> None:
    assert pirate_share(text) == pytest.approx(share)


def test_a_score_is_over_all_answers() -> None:
    found = score(0.25, [QUESTION] * 4, [QUERY, QUERY, TALK, "Gold"])
    assert found == Score(0.25, sql=0.5, pirate=0.25, neither=0.25)


@pytest.fixture
def server() -> Iterator[str]:
    """Answers as a pirate as soon as the pirate weighs more."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            weights = {
                name: float(weight) for name, weight in (p.split(":") for p in body["model"].split("+"))
            }
            content = TALK if weights["pirate"] > weights["sql"] else QUERY
            raw = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as fake:
        thread = threading.Thread(target=fake.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{fake.server_port}"
        fake.shutdown()
        thread.join()


def test_every_weight_is_asked_every_question_and_drawn(server: str, tmp_path: Path) -> None:
    assert mixture(0.25) == "sql:0.750+pirate:0.250"
    scores = measure(server, [QUESTION] * 3, [0.0, 0.25, 1.0])
    assert [(each.weight, each.sql, each.pirate) for each in scores] == [(0, 1, 0), (0.25, 1, 0), (1, 0, 1)]
    for name in ("out.png", "out.svg"):
        draw(scores, tmp_path / name, 3)
        assert (tmp_path / name).stat().st_size > 1000

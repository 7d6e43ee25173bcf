"""The demo as a newcomer meets it: started without arguments, served in 4 bits, asked through HTTP."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.serving import Served, serving

ROOT = Path(__file__).resolve().parent.parent
ROWS = [json.loads(line) for line in (ROOT / "demo" / "heldout.jsonl").read_text().splitlines()]
STREAMS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("demo")) as served:
        yield served


def share_exact(server: Served, model: str | None) -> dict[str, float]:
    """Ask every held-out prompt, all adapters mixed; ``model`` answers in place of the row's adapter if given."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def right(row: dict[str, object]) -> bool:
        answer = client.chat.completions.create(
            model=model or str(row["adapter"]),
            messages=row["messages"],  # type: ignore[arg-type]  # as the file has them
            temperature=0,
            max_tokens=64,
        )
        return answer.choices[0].message.content == row["expected"]

    with ThreadPoolExecutor(STREAMS) as pool:
        results = list(pool.map(right, ROWS))
    shares = {}
    for adapter in {row["adapter"] for row in ROWS}:
        own = [ok for ok, row in zip(results, ROWS, strict=True) if row["adapter"] == adapter]
        shares[adapter] = sum(own) / len(own)
    return shares


def test_each_adapter_does_its_task(server: Served) -> None:
    shares = share_exact(server, None)
    assert len(shares) >= 3
    assert min(shares.values()) >= 0.95, shares


def test_the_base_does_none_of_them(server: Served) -> None:
    base = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").models.list().data[0].id
    shares = share_exact(server, base)
    assert max(shares.values()) <= 0.05, shares


def test_models_lists_the_base_and_its_adapters(server: Served) -> None:
    models = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").models.list().data
    adapters = {model.id for model in models[1:]}
    assert adapters == {row["adapter"] for row in ROWS}
    assert {model.parent for model in models[1:]} == {models[0].id}  # type: ignore[attr-defined]


def test_the_base_is_held_in_four_bits(server: Served) -> None:
    assert "nf4" in server.log.read_text().lower()

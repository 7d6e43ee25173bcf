"""Large answers are written in parts."""

import json
from collections.abc import Iterator

import pytest

from manylora.server.api.blocks import Part
from manylora.server.api.pacing import Rests
from manylora.server.api.rendering import LEVELS, Written, _parts, dumps, dumps_in_parts, pieces_of
from manylora.server.api.response_items import item_of

RESTS = Rests(lambda: False)


def test_parts_are_the_text_that_one_piece_is() -> None:
    value = {"a": [1, {"b": ["é", None, 0.1]}, []], "c": {}, "d": [[[[[[1, [2]]]]]]], "e": "x"}
    assert dumps_in_parts(value, RESTS) == dumps(value)


def test_long_lists_of_numbers_and_texts_are_written_in_few_parts() -> None:
    value = {
        "tokens": list(range(100_000)),
        "names": ["é"] * 1000 + [None],
        "one": [1],
        "mixed": [1, {"a": [2]}],
    }
    assert dumps_in_parts(value, RESTS) == dumps(value)
    assert len([*_parts(value, LEVELS)]) < 500


def test_an_iterator_is_a_list_whose_items_are_made_one_after_the_other() -> None:
    alive: list[int] = []

    class Item(dict[str, int]):
        def __del__(self) -> None:
            alive.remove(self["n"])

    def items() -> Iterator[Item]:
        for n in range(5):
            alive.append(n)
            assert len(alive) <= 2, "items stay after they were written"
            yield Item(n=n)

    written = dumps_in_parts({"choices": items(), "usage": 1}, RESTS)
    assert json.loads(written) == {"choices": [{"n": n} for n in range(5)], "usage": 1}


ALTERNATIVES = [{"token": "x" * 9, "logprob": -1.25, "bytes": [120] * 9}] * 20
TOKEN = {**ALTERNATIVES[0], "top_logprobs": ALTERNATIVES}
SOME = [TOKEN] * 500


@pytest.mark.parametrize(
    "answer",
    [
        {"output": [item_of(Part(0, "text"), "m", "completed", lambda part: SOME)]},
        {"output": [item_of(Part(0, "text"), "m", "completed", lambda part: iter(SOME))]},
        {"choices": [{"message": {}, "logprobs": {"content": SOME, "refusal": None}}]},
        {
            "choices": [
                {"text": "", "logprobs": {"top_logprobs": [dict.fromkeys(map(str, range(20)), -1.25)] * 500}}
            ]
        },
    ],
    ids=["response", "response, one by one", "chat", "completion"],
)
def test_no_part_of_an_answer_is_more_than_a_tokens(answer: object) -> None:
    parts = [*_parts(answer, LEVELS)]
    assert max(map(len, parts)) <= len(dumps(TOKEN))
    assert len(parts) < 500 * 20, "nor is it taken apart number by number"


def test_json_that_is_written_goes_into_a_value_as_it_is() -> None:
    value = {"a": [{"b": Written('[1,"é"]'), "c": "d"}], "e": 2}
    assert "".join(pieces_of(value)) == dumps_in_parts(value, RESTS) == '{"a":[{"b":[1,"é"],"c":"d"}],"e":2}'

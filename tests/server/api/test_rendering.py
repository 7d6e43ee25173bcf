"""Large answers are written in parts."""

import json
from collections.abc import Iterator

from manylora.server.api.pacing import Rests
from manylora.server.api.rendering import LEVELS, _parts, dumps, dumps_in_parts

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

"""Whatever a row holds, it is read and rendered, or refused with its line: never a traceback."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.training.check.rows import flags_of
from manylora.training.check.texts import row_text
from manylora.training.data.columns import FIELDS
from manylora.training.data.example import Example, Source
from manylora.training.data.formats import FORMATS, DataFormat
from manylora.training.data.marks import MARKS, PARTS
from manylora.training.data.render import Rendered, Renderer
from manylora.training.errors import InvalidData
from tests.training.data.families import tokenizer_of

HERE = Source("a.jsonl", 3)
WORDS = (
    "",
    "user",
    "assistant",
    "human",
    "gpt",
    "function_call",
    "tool",
    "Hello",
    "[]",
    "{}",
    '[{"name": "f"}]',
    "\ud83d",
)
KEYS = (
    "role",
    "content",
    "from",
    "value",
    "type",
    "text",
    "name",
    "arguments",
    "function",
    "tool_calls",
    *MARKS,
    *PARTS,
)

leaves = st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.sampled_from(WORDS)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(WORDS) | values,
        "content": values,
        "from": st.sampled_from(WORDS) | values,
        "value": values,
        "tool_calls": values,
        "loss": values,
    },
)
fields = st.one_of(values, st.lists(turns, min_size=1, max_size=4))
rows = st.dictionaries(st.sampled_from((*FIELDS, "functions", "id")), fields, min_size=1, max_size=5)
RENDERERS = [Renderer(tokenizer_of(name), 64) for name in ("chatml", "qwen2.5", "gemma")]


def read(known: DataFormat, row: dict[str, Any]) -> Example | InvalidData:
    try:
        return known.example(row, HERE)
    except InvalidData as error:
        return error


@settings(max_examples=150, deadline=None)
@given(rows)
def test_a_row_is_read_or_refused(row: dict[str, Any]) -> None:
    for one in FORMATS:
        example = read(one, row)
        if isinstance(example, InvalidData):
            assert str(example).startswith("a.jsonl:3: ")
            continue
        assert Example.from_json(example.to_json(), HERE) == example
        assert all(isinstance(message["content"], str) for message in example.messages)
        flags_of(example)
        row_text(example)
        for renderer in RENDERERS:
            [found] = renderer.render_batch([example])
            assert isinstance(found, Rendered) or str(found).startswith("a.jsonl:3: ")

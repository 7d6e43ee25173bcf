"""The reading of examples, and the rule by which they are compared: it must not let a wrong page pass."""

import pytest

from tests.docs.examples import Block, blocks_of, examples_of, prints

PAGE = """
Text.

    curl -s $U/x -d '{"a":
      1}'
    {"b":2,
     "c":3}

    curl -s $U/y    # a comment's "quote

More text.

```bash
for x in 1; do
  curl -s $U/z
done
```
"""


def test_commands_and_what_they_print_are_found() -> None:
    indented, fenced = blocks_of(PAGE)
    first, second = examples_of(indented)
    assert (first.line, first.command) == (4, "curl -s $U/x -d '{\"a\":\n  1}'")
    assert first.printed == '{"b":2,\n "c":3}'
    assert (second.command, second.printed) == ("curl -s $U/y    # a comment's \"quote", "")
    assert fenced == Block(14, "bash", ("for x in 1; do", "  curl -s $U/z", "done"))
    assert [*examples_of(fenced)] == []


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ('{"a":1,\n "b":2}', '{"a":1,"b":2}', True),
        ('{"a":1}', '{"a":2}', False),
        ('{"a":1}', '{"a":1,"b":2}', False),
        ('{"a":1,"b":2}', '{"a":1}', False),
        ('{"id":"x-…","a":1}', '{"id":"x-123","a":1}', True),
        ('{"id":"x-…","a":1}', '{"id":"y-123","a":1}', False),
        ('{"id":"x-…","a":2}', '{"id":"x-123","a":1}', False),
        ('{"created":5}', '{"created":6}', True),
        ('{"created":5}', '{"created":null}', False),
        ('{"id":4,"a":1}', '{"id":7,"a":1}', True),
        ('{"id":"x"}', '{"id":"y"}', False),
        ("a: b", "a:b", False),
        ("{…}", "[1]", False),
        ("HTTP/1.1 200 OK\n…\n{}", "HTTP/1.1 200 OK\r\ndate: x\r\n\r\n{}", True),
        ("HTTP/1.1 200 OK\n…\n{}", "HTTP/1.1 201 OK\r\ndate: x\r\n\r\n{}", False),
    ],
)
def test_the_rule_lets_only_what_is_left_out_differ(shown: str, printed: str, same: bool) -> None:
    assert prints(shown, printed) is same

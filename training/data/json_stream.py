"""Reads the elements of a JSON array one by one, or JSON values that follow each other, without holding the file."""

import json
import re
from collections.abc import Iterator
from typing import TextIO

from manylora.training.data.json_keys import Keys
from manylora.training.data.row import Row

CHUNK_CHARACTERS = 2**18
MAX_ROW_CHARACTERS = 64 * 2**20
"""Of one element. Longer ones count as broken, so that a lost quote doesn't pull a whole file into memory."""
_LONGEST_WORD = 32
"""An error this near the end of what was read may only mean that a word goes on behind it."""
_KEPT = 256
"""Characters kept before the place where reading is, to see how far an element is indented."""
_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_values(file: TextIO) -> Iterator[Row]:
    """Yield the elements of the array that ``file`` is, or the values that stand in it one behind the other.

    Behind an element that isn't JSON, reading goes on at the next line that begins an object where elements begin.
    """
    cursor = _Cursor(file)
    first = cursor.peek()
    if first == "[":
        cursor.open_array()
        yield from _elements(cursor)
    elif first:
        yield from _values(cursor)


def _elements(cursor: "_Cursor") -> Iterator[Row]:
    while (char := cursor.peek()) != "]":
        if not char:
            yield Row(cursor.line, None, "isn't JSON: the file ends inside the array")
            return
        row = cursor.value()
        yield row
        if (char := cursor.peek()) == ",":
            cursor.advance(1)
        elif char == "{" and row.error is None:
            yield Row(cursor.line, None, "isn't JSON: no comma before it")
    cursor.advance(1)
    if cursor.peek():
        yield Row(cursor.line, None, "isn't JSON: stands behind the end of the array")


def _values(cursor: "_Cursor") -> Iterator[Row]:
    while cursor.peek():
        yield cursor.value()


def too_much(error: Exception) -> str:
    """Say what of JSON that is JSON can't be read."""
    return "nested too deep" if isinstance(error, RecursionError) else "a number has too many digits"


class _Cursor:
    """A place in a text that is read piece by piece."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._ended = False
        self._keys = Keys()
        self._decoder = json.JSONDecoder(object_pairs_hook=self._keys)
        self._rows = 0
        self._last_line = 0
        """On which something stands before what is read next."""
        self.line = 1

    def open_array(self) -> None:
        """Go behind the array's bracket, beside which its first element may stand."""
        self._last_line = self.line
        self.advance(1)

    def advance(self, characters: int) -> None:
        """Go on, counting lines."""
        end = self._at + characters
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def peek(self) -> str:
        """Go to the next character that isn't white space and return it; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self.advance(space.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(CHUNK_CHARACTERS):
                return ""

    def value(self) -> Row:
        """Read the value that begins here; or, if it is broken, pass over it."""
        line = self.line
        self._rows += 1
        number = self._rows if line == self._last_line else None
        row = self._decoded(line, number)
        self._last_line = self.line if row.error is None else line
        return row

    def _decoded(self, line: int, number: int | None) -> Row:
        while True:
            self._keys.twice = None
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._may_go_on(error) and self._read(max(CHUNK_CHARACTERS, len(self._text) - self._at)):
                    continue
                where = f"line {line + error.doc.count(chr(10), self._at, error.pos)}"
                self._pass_over()
                return Row(line, None, f"isn't JSON: {error.msg.removesuffix(' at')} on {where}", number)
            except (RecursionError, ValueError) as error:
                self._pass_over()
                return Row(line, None, f"isn't JSON that can be read: {too_much(error)}", number)
            self.advance(end - self._at)
            twice = self._keys.error()
            return Row.of(line, value, number) if twice is None else Row(line, None, twice, number)

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        near_end = error.pos >= len(self._text) - _LONGEST_WORD
        unfinished = near_end or error.msg.startswith("Unterminated string")
        return unfinished and len(self._text) - self._at < MAX_ROW_CHARACTERS

    def _pass_over(self) -> None:
        """Go to the next line that begins an object as far to the right as the one that begins here."""
        before = self._text[: self._at].rpartition("\n")[2]
        indent = re.escape(before) if before.isspace() or not before else r"[ \t]?"
        border = re.compile(rf"\n{indent}(?=\{{)")
        self.advance(1)
        while (found := border.search(self._text, self._at)) is None:
            self.advance(max(0, len(self._text) - self._at - _KEPT))
            if not self._read(CHUNK_CHARACTERS):
                self.advance(len(self._text) - self._at)
                return
        self.advance(found.end() - self._at)

    def _read(self, characters: int) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        more = self._file.read(characters)
        self._ended = not more
        dropped = max(0, self._at - _KEPT)
        self._text = self._text[dropped:] + more
        self._at -= dropped
        return bool(more)

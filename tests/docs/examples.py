"""Examples as pages of the documentation show them: commands, and what they print.

A code block is fenced or indented by four spaces. In it, a line that begins with ``curl`` begins a command, which
goes on until its quotes are closed; what follows, up to the next command, is what it prints.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

ELLIPSIS = "…"
MADE_ANEW = re.compile(r'"(created|id)":\d+')


@dataclass(frozen=True)
class Example:
    """A command of a page, and what the page says that it prints; "" if it says nothing."""

    line: int
    command: str
    printed: str


@dataclass(frozen=True)
class Block:
    """A code block: its first line, its language ("" if it is indented), its lines without the indent."""

    line: int
    language: str
    lines: tuple[str, ...]


def blocks_of(page: str) -> Iterator[Block]:
    """Yield a page's code blocks."""
    lines = page.splitlines()
    number = 0
    while number < len(lines):
        begin = number
        if lines[begin].startswith("```"):
            end = next(n for n in range(begin + 1, len(lines)) if lines[n].startswith("```"))
            yield Block(begin + 2, lines[begin].strip("` "), tuple(lines[begin + 1 : end]))
            number = end + 1
        elif lines[begin].startswith("    "):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number]):
                number += 1
            yield Block(begin + 1, "", tuple(line[4:] for line in lines[begin:number]))
        else:
            number += 1


def examples_of(block: Block) -> Iterator[Example]:
    """Yield a block's commands that ask a server, each with what it prints."""
    begins = [n for n, line in enumerate(block.lines) if line.startswith("curl ")]
    for begin, after in pairwise([*begins, len(block.lines)]):
        end = begin + 1
        while not _is_whole("\n".join(block.lines[begin:end])):
            end += 1
        printed = "\n".join(block.lines[end:after]).strip()
        yield Example(block.line + begin, "\n".join(block.lines[begin:end]), printed)


def _is_whole(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return not command.endswith("\\")


def prints(expected: str, printed: str) -> bool:
    """Return whether ``printed`` is what a page shows.

    The rule: an ellipsis stands for anything, times of creation and numbers of adapters aren't compared, and breaks
    between two lines of one JSON text don't count. All else is compared.
    """
    pattern = ".*?".join(map(re.escape, _plain(expected).split(ELLIPSIS)))
    return re.fullmatch(pattern, _plain(printed), re.DOTALL) is not None


def _plain(text: str) -> str:
    unfolded = re.sub(r"\n +", "", text.replace("\r", ""))
    return MADE_ANEW.sub(r'"\1":0', unfolded).strip()

"""How long a server takes to start, and what memory it has then: `python -m manylora.loadtest.checks.starting [BASE]`.

Starts `manylora serve` twice on a base, or on noise in a named shape: the first start prepares the weights and keeps
them, the second maps them. Prints the time until /ready and the resident memory in its parts, after each start and
after some requests. Exit status 1 if a bar of the shape is missed.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

from manylora.loadtest.material.checkpoints import SHAPES, write_base
from manylora.loadtest.material.server_process import ServerProcess, running, start_server
from manylora.loadtest.material.text_table import text_table
from manylora.server.model.weight_cache import ENDING, WEIGHTS

MB = 1e6
REQUESTS, TOKENS = 8, 32
START_SECONDS, KEEP_SECONDS = 900.0, 300.0
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(?P<name>.*)")


@dataclass(frozen=True, slots=True)
class Bars:
    """What a shape is held to; None: nothing."""

    first: float | None = None
    """Seconds of the first start."""
    second: float | None = None
    weights: float | None = None
    """MB of the kept weights."""
    rest: float | None = None
    """MB of all else that is resident after the second start."""


BARS: Mapping[str, Bars] = {
    "qwen2.5-0.5b": Bars(weights=360, rest=450),
    "qwen2.5-7b": Bars(first=40, second=5),
}


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory of a process and its children, MB. What several processes share counts in each."""

    kept: float
    """Pages of kept weights, which belong to the page cache."""
    anonymous: float
    """Its own."""
    files: float
    """Libraries and other files."""
    proportional: float
    """All of it, of what is shared each one's part (Pss)."""

    @property
    def rest(self) -> float:
        """Everything but kept weights."""
        return self.anonymous + self.files


@dataclass(frozen=True, slots=True)
class Start:
    """What was seen of a start."""

    name: str
    seconds: float | None
    resident: Resident


def resident(pid: int) -> Resident:
    """Return the memory of a process and its children."""
    processes = [psutil.Process(pid)]
    processes += processes[0].children(recursive=True)
    kept = anonymous = files = proportional = 0.0
    for process in processes:
        for name, field, nbytes in _smaps(process.pid):
            if field == "Pss":
                proportional += nbytes
            elif name.endswith(ENDING):
                kept += nbytes
            elif name.startswith("/"):
                files += nbytes
            else:
                anonymous += nbytes
    return Resident(kept / MB, anonymous / MB, files / MB, proportional / MB)


def _smaps(pid: int) -> Iterator[tuple[str, str, int]]:
    """Yield each mapping's name, Rss or Pss, and its bytes."""
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        begins = _MAPPING.fullmatch(line)
        if begins:
            name = begins["name"]
            continue
        field, _, value = line.partition(":")
        if field in ("Rss", "Pss"):
            yield name, field, int(value.split()[0]) * 1024


def starts(base: Path, work: Path, arguments: Sequence[str]) -> list[Start]:
    """Start twice with one data directory."""
    found = []
    for name in ("first start", "second start"):
        begun = time.monotonic()
        server = start_server(base, work, ("--served-model-name", "base", *arguments))
        with running(server, start_seconds=START_SECONDS):
            seconds = time.monotonic() - begun
            found.append(Start(name, seconds, resident(server.process.pid)))
            _wait_until_kept(server)
            if name == "second start":
                _ask(server)
                after = f"after {REQUESTS} requests at once"
                found.append(Start(after, None, resident(server.process.pid)))
    return found


def _wait_until_kept(server: ServerProcess) -> None:
    deadline = time.monotonic() + KEEP_SECONDS
    while not list((server.data_dir / WEIGHTS).glob(f"*{ENDING}")):
        if time.monotonic() > deadline or server.process.poll() is not None:
            raise RuntimeError(f"the weights were not kept:\n{server.log_tail()}")
        time.sleep(0.1)


def _ask(server: ServerProcess) -> None:
    body = {"model": "base", "prompt": "hello", "max_tokens": TOKENS, "ignore_eos": True}

    def ask(number: int) -> None:
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=600).raise_for_status()

    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(ask, range(REQUESTS)))


def missed(found: Sequence[Start], kept: float, bars: Bars) -> list[str]:
    """Return a sentence for each bar that is missed; ``kept``: MB of the file of weights."""
    first, second = found[0], found[1]
    held = (
        ("first start", first.seconds, bars.first, "s"),
        ("second start", second.seconds, bars.second, "s"),
        ("weights", kept, bars.weights, "MB"),
        ("all else", second.resident.rest, bars.rest, "MB"),
    )
    return [
        f"{name}: {value:.1f} {unit}, at most {most:g} are allowed"
        for name, value, most, unit in held
        if most is not None and value is not None and value > most
    ]


def table(found: Sequence[Start]) -> str:
    """Return the table of all starts."""
    head = ("", "ready, s", "kept weights, MB", "own, MB", "libraries, MB", "all but weights, MB", "Pss, MB")
    rows = [
        (
            start.name,
            "" if start.seconds is None else f"{start.seconds:.1f}",
            *(
                f"{value:.0f}"
                for value in (
                    start.resident.kept,
                    start.resident.anonymous,
                    start.resident.files,
                    start.resident.rest,
                    start.resident.proportional,
                )
            ),
        )
        for start in found
    ]
    return text_table(head, rows)


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, nargs="?", help="directory of a model; none: noise in --shape")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b", help="whose bars are held")
    parser.add_argument("--work", type=Path, help="where the noise and the server's data go (temporary)")
    parser.add_argument(
        "--serve", nargs=argparse.REMAINDER, default=[], help="what follows is given to manylora serve"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        base = options.base or write_base(work / "base", SHAPES[options.shape], dtype=torch.bfloat16)
        found = starts(base, work / "server", options.serve)
        [file] = (work / "server" / "data" / WEIGHTS).glob(f"*{ENDING}")
        kept = file.stat().st_size / MB
    faults = missed(found, kept, BARS.get(options.shape, Bars()))
    print(f"{table(found)}\n\nthe weights are {kept:.0f} MB")  # noqa: T201  # the result
    print("\n".join(faults or ["every bar of this shape holds"]))  # noqa: T201  # the result
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Adapters exported for llama.cpp say there what they say here: `python -m manylora.loadtest.checks.gguf_adapter …`.

For a small random base of each architecture, in float32: llama.cpp's own converter makes an F32 GGUF of it; two
adapters (ranks, targets and rules of their own) and a mixture of them are exported as gguf-lora by a running server;
llama.cpp's server loads each and answers prompts greedily, with keys and values in float32; and manylora is asked of
each token of these answers whether it is the most likely one here, too. So token after token both say the same. The
base's answers are compared the same way, and must be others than the adapter's.

    --llama-server FILE --llama-source DIR [--llama-python FILE] --tokenizer DIR

The tokenizer is a real one, since the converter takes no other. Exit status 1 if a token differs; 0, and a line that
says why, where llama.cpp isn't there.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from time import sleep
from typing import Any

import httpx
from rich.console import Console

from manylora.loadtest.bench.peers.files import PeerError, run_tool
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.checkpoints import (
    ALL_LINEAR,
    AdapterShape,
    BaseShape,
    write_adapter,
    write_base,
)
from manylora.loadtest.material.server_process import (
    ServerProcess,
    free_port,
    running,
    start_line,
    start_server,
)

QWEN2 = BaseShape("qwen2", 151936, 128, 192, 2, 4, 2, 1024)
SHAPES = (QWEN2, replace(QWEN2, family="qwen3"), replace(QWEN2, family="llama", tied=False))
ADAPTERS = {
    "one": AdapterShape(rank=8, targets=ALL_LINEAR, seed=1),
    "two": AdapterShape(rank=5, alpha=3, targets=("q_proj", "k_proj", "up_proj"), seed=2, rslora=True),
}
MODELS = ("one", "two", "one:0.7+two:-0.5")
PROMPTS, TOKENS = 8, 24
FLAGS = (
    "--quantization",
    "none",
    "--dtype",
    "float32",
    "--kernels",
    "plain",
    "--kv-cache-gib",
    "0.1",
    "--threads",
    "1",
)
CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Llama:
    """Where llama.cpp is."""

    server: Path
    source: Path
    python: Path

    @property
    def missing(self) -> str | None:
        """Why it can't be used, if it can't."""
        for path in (self.server, self.source / "convert_hf_to_gguf.py", self.python):
            if not path.is_file():
                return f"{path} is not there"
        return None


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer of llama.cpp, token by token, beside what is most likely here."""

    tokens: tuple[int, ...]
    differs_at: int | None
    """The first token that isn't the most likely one here."""
    by: float = 0.0
    """By how much the log probability of that one is lower, in nats."""


def judge(tokens: Sequence[int], chosen: Sequence[float], best: Sequence[float]) -> Judged:
    """Hold an answer's tokens (their log probabilities here) against the highest at each position."""
    for position, (own, highest) in enumerate(zip(chosen, best, strict=True)):
        if own < highest:
            return Judged(tuple(tokens), position, highest - own)
    return Judged(tuple(tokens), None)


def check(llama: Llama, tokenizer: Path, directory: Path) -> Report:
    """Run it for all shapes. Raises PeerError."""
    report = Report("7. An exported gguf-lora gives llama.cpp's server the greedy tokens of ours, in float32")
    for shape in SHAPES:
        _check_shape(report, llama, tokenizer, directory / shape.family, shape)
    return report


def _check_shape(report: Report, llama: Llama, tokenizer: Path, home: Path, shape: BaseShape) -> None:
    base = write_base(home / "base", shape, tokenizer=tokenizer)
    named = [f"{name}={write_adapter(home / name, base, each)}" for name, each in ADAPTERS.items()]
    whole = home / "base.gguf"
    converter = [str(llama.python), str(llama.source / "convert_hf_to_gguf.py"), str(base)]
    run_tool([*converter, "--outfile", str(whole), "--outtype", "f32"])
    random = Random(7)
    prompts = [
        [random.randrange(1000, 100_000) for _ in range(random.randint(1, 60))] for _ in range(PROMPTS)
    ]
    ours = start_server(
        base, home / "ours", [*FLAGS, *(word for each in named for word in ("--adapter", each))]
    )
    with running(ours):
        for number, model in enumerate(MODELS):
            file = _exported(ours.url, model, home / f"{number}.gguf")
            with _llama(llama, whole, file, home) as theirs:
                with_adapter = [_judged(ours, theirs, model, prompt, 1.0) for prompt in prompts]
                without = [_judged(ours, theirs, base.name, prompt, 0.0) for prompt in prompts]
            _report(report, f"{shape.family}, {model}", with_adapter)
            if number == 0:
                _report(report, f"{shape.family}, its base", without)
            moved = sum(one.tokens != other.tokens for one, other in zip(with_adapter, without, strict=True))
            report.share(f"{shape.family}, {model}: other answers than the base's", moved, PROMPTS)


def _report(report: Report, what: str, answers: Sequence[Judged]) -> None:
    wrong = [
        f"token {each.differs_at} by {each.by:.1e} nats" for each in answers if each.differs_at is not None
    ]
    report.share(f"{what}: the same {TOKENS} tokens", len(answers) - len(wrong), len(answers), wrong)


def _judged(
    ours: ServerProcess, theirs: ServerProcess, model: str, prompt: list[int], scale: float
) -> Judged:
    asked = {
        "prompt": prompt,
        "n_predict": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_tokens": True,
        "cache_prompt": False,
        "lora": [{"id": 0, "scale": scale}],
    }
    tokens = _post(f"{theirs.url}/completion", asked)["tokens"]
    if len(tokens) != TOKENS:
        raise PeerError(f"llama.cpp's server made {len(tokens)} tokens, not {TOKENS}")
    body = {"model": model, "prompt": [*prompt, *tokens], "max_tokens": 0, "echo": True, "logprobs": 1}
    said = _post(f"{ours.url}/v1/completions", body)["choices"][0]["logprobs"]
    best = [max(each.values()) for each in said["top_logprobs"][len(prompt) :]]
    return judge(tokens, said["token_logprobs"][len(prompt) :], best)


def _exported(url: str, model: str, file: Path) -> Path:
    job = _post(f"{url}/exports", {"model": model, "format": "gguf-lora"})
    while job["status"] in ("queued", "running"):
        sleep(0.1)
        job = httpx.get(f"{url}/exports/{job['id']}").json()
    if job["status"] != "succeeded":
        raise PeerError(f"the export of {model} {job['status']}: {job['error']}")
    file.write_bytes(httpx.get(f"{url}/exports/{job['id']}/download", timeout=60).content)
    return file


@contextmanager
def _llama(llama: Llama, base: Path, adapter: Path, home: Path) -> Iterator[ServerProcess]:
    port = free_port()
    line = [
        str(llama.server),
        "-m",
        str(base),
        "--lora",
        str(adapter),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    # The cache would be of 16 bits.
    line += ["-np", "1", "-c", str(CONTEXT), "-t", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    process = start_line(line, os.environ, port, home / f"llama-{adapter.stem}", "/health")
    with running(process):
        yield process


def _post(url: str, body: object) -> dict[str, Any]:
    response = httpx.post(url, json=body, timeout=120)
    if response.is_error:
        raise PeerError(f"{url} gave {response.status_code}: {response.text[:300]}")
    found: dict[str, Any] = response.json()
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run the check and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--llama-source", type=Path, help="its source, for the converter")
    parser.add_argument(
        "--llama-python", type=Path, default=Path(sys.executable), help="the converter's python"
    )
    parser.add_argument("--tokenizer", type=Path, help="directory of a real tokenizer")
    given = parser.parse_args(words)
    console = Console(emoji=False, highlight=False)
    if given.llama_server is None or given.llama_source is None or given.tokenizer is None:
        console.print("skipped: name llama.cpp with --llama-server and --llama-source, and a --tokenizer")
        return 0
    llama = Llama(given.llama_server, given.llama_source, given.llama_python)
    if llama.missing is not None:
        console.print(f"skipped: {llama.missing}", markup=False)
        return 0
    with tempfile.TemporaryDirectory(prefix="manylora-gguf-") as directory:
        try:
            report = check(llama, given.tokenizer, Path(directory))
        except (PeerError, ValueError, OSError, RuntimeError) as error:
            console.print(f"can't be checked: {error}", markup=False)
            return 1
    report.print(console)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())

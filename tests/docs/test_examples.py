"""Every example of a page that asks a server is run against the demo, and what it prints is compared."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.examples import blocks_of, examples_of, prints
from tests.serving import Served, serving

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/api.md", "docs/adapters.md", "README.md")
WRITTEN = "http://127.0.0.1:8000"
"""The server of the pages."""


def page(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demo, with the adapters that the pages name."""
    root = tmp_path_factory.mktemp("docs")
    adapters = ROOT / "demo" / "adapters"
    shutil.copytree(adapters, root / "demo" / "adapters")
    for name, source in (("sales-v1", "pirate"), ("sales-v2", "json")):
        shutil.copytree(adapters / source, root / name)
    with serving(root, "--adapter-root", str(root), "--kv-cache-gib", "0.1") as served:
        yield served


def run(command: str, server: Served) -> str:
    """Run a shell command of a page; return what it prints."""
    environment = {**os.environ, "U": server.url}
    line = ["bash", "-c", command.replace(WRITTEN, server.url)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, f"{command}\nneeds bash and curl: {done.stderr}"
    return done.stdout


def faults_of(name: str, server: Served) -> Iterator[str]:
    """Yield what a page's examples print instead of what it says."""
    for block in blocks_of(page(name)):
        if block.language == "python":
            continue  # test_readmes_programs_print_what_it_shows
        if "for model in" in block.lines[0]:
            printed = run("\n".join(block.lines), server)
            assert '"error"' not in printed, printed
            continue
        for example in examples_of(block):
            printed = run(example.command, server)
            told_of_errors = '"error"' in example.printed
            right = prints(example.printed, printed) if example.printed else '"error"' not in printed
            if not right or (not told_of_errors and '"error":{' in printed):
                yield f"{name}:{example.line}: {example.command}\nprints\n{printed}\nnot\n{example.printed}"


@pytest.mark.parametrize("name", PAGES)
def test_examples_print_what_the_page_shows(server: Served, name: str) -> None:
    faults = [*faults_of(name, server)]
    assert not faults, "\n\n".join(faults)


def test_the_pages_have_examples() -> None:
    counts = {name: sum(len([*examples_of(block)]) for block in blocks_of(page(name))) for name in PAGES}
    assert counts["docs/api.md"] >= 10
    assert counts["README.md"] >= 3


def test_readmes_programs_print_what_it_shows(server: Served) -> None:
    """Each goes on where the one before it ended."""
    blocks = [*blocks_of(page("README.md"))]
    programs = [n for n, block in enumerate(blocks) if block.language == "python"]
    lines = [line for n in programs for line in blocks[n].lines]
    code = "\n".join(lines).replace(WRITTEN, server.url)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(blocks[n + 1].language == "text" for n in programs)
    assert done.stdout.splitlines() == [line for n in programs for line in blocks[n + 1].lines]


def test_files_lie_where_the_page_says(server: Served) -> None:
    [layout] = [
        block for block in blocks_of(page("docs/adapters.md")) if "registry.id" in "".join(block.lines)
    ]
    shown = [line.split()[0] for line in layout.lines if line.startswith(".manylora/")]
    assert len(shown) >= 5
    for path in shown:
        below = re.sub(r"<\w+>", "*", path.removeprefix(".manylora/"))
        assert [*server.data_dir.glob(below)], f"{path} is not there: {sorted(server.data_dir.rglob('*'))}"

"""Programs that people run today, against the demo: written as for OpenAI but for address, key and model.

Each is a file of tests in programs/ or node/ that knows nothing of manylora, run in a process of its own: some of these
libraries don't go together with each other or with what the suite needs. Those that do come with `manylora[clients]`;
`make clients` puts the others into build/clients and node/node_modules.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.serving import Served, serving

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / "build" / "clients"
SECONDS = 240.0
AS_IT_IS = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # programs get nothing of the suite's
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks the network for a list of prices
}
# What asks for anything beyond this machine by a proxy that is set fails: node's fetch reads none of these.
NOWHERE = {
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
}
OTHERS = ("MANYLORA_", "OPENAI_", "ANTHROPIC_", "LANGCHAIN_", "LANGSMITH_", "LITELLM_")
"""Beginnings of variables that these libraries read."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demo, whose adapter `tools` calls functions."""
    with serving(tmp_path_factory.mktemp("demo")) as served:
        yield served


@pytest.mark.parametrize(
    ("program", "packages"),
    [
        ("openai", ["openai"]),
        ("anthropic", ["anthropic"]),
        ("langchain", ["langchain_openai"]),
        ("pydantic_ai", ["pydantic_ai", "openai"]),
        ("litellm", ["litellm"]),
        ("llama_index", ["llama_index.llms.openai_like", "llama_index.embeddings.openai_like"]),
        ("instructor", ["instructor"]),
    ],
)
def test_in_python(demo: Served, program: str, packages: list[str]) -> None:
    line = [interpreter_with(packages), "-m", "pytest", "-q", str(HERE / "programs" / f"use_{program}.py")]
    run(demo, line)


def test_in_node(demo: Served) -> None:
    node, folder = shutil.which("node"), HERE / "node"
    if node is None:
        pytest.skip("node isn't installed")
    if not (folder / "node_modules" / "openai").is_dir():
        pytest.skip("openai-node isn't installed: `make clients`")
    run(demo, [node, "--test", str(folder / "use_openai.mjs")])


def test_programs_get_no_proxy_that_leads_anywhere() -> None:
    real = dict.fromkeys(
        ("http_proxy", "HTTPS_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"), "http://real:1"
    )
    environment = environment_of({**real, "no_proxy": "*", "PATH": "/bin", "OPENAI_API_KEY": "secret"})
    proxies = {name: value for name, value in environment.items() if name.lower().endswith("_proxy")}
    assert set(proxies) == {spelled for name in NOWHERE for spelled in (name, name.lower())}
    assert set(proxies.values()) == set(NOWHERE.values())
    assert environment["PATH"] == "/bin"
    assert "OPENAI_API_KEY" not in environment


def interpreter_with(packages: Sequence[str]) -> str:
    """Return a Python that has the packages: this one, or that of `make clients`. Skips the test if neither has."""
    if all(map(is_here, packages)):
        return sys.executable
    roots = list(ENVIRONMENT.glob("lib/python*/site-packages"))
    if any(all((root / each.replace(".", "/")).is_dir() for each in packages) for root in roots):
        return str(ENVIRONMENT / "bin" / "python")
    pytest.skip(f"{packages[0]} isn't installed: `make clients`")


def is_here(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it is a part of
        return False


def environment_of(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return what programs get of an environment: nothing that these libraries read but what is set here."""
    own = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(OTHERS) and not name.lower().endswith("_proxy")
    }
    lower = {
        name.lower(): value for name, value in NOWHERE.items()
    }  # goes over upper case, where both are read
    return {**own, **AS_IT_IS, **NOWHERE, **lower}


def run(demo: Served, line: list[str]) -> None:
    """Run a program against the server; fail with what it printed."""
    environment = {**environment_of(os.environ), "MANYLORA_URL": demo.url}
    done = subprocess.run(line, check=False, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"

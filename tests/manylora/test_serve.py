"""`manylora serve` from the outside: what it says at start, how it ends, what it remembers, how it refuses."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner, Result

from manylora.cli import app
from manylora.serve import DrainingServer, StartError, find_named_base, serve
from manylora.server.config import ServeSettings
from tests.serving import Served, answer, serving, write_two_adapters

LONG = 900
CLOSED = "MANYLORA_ADMIN_KEY"
"""Told where adapters can't be managed from another machine."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_adapters(tmp_path_factory.mktemp("files"))


def flags(files: Path, *more: str) -> tuple[str, ...]:
    root = files / "adapters"
    return (str(files / "base"), "--adapter-root", str(root), "--kv-cache-gib", "0.05", *more)


@contextmanager
def long_stream(server: Served) -> Iterator[Iterator[str]]:
    """A stream that has begun."""
    body = {"model": "base", "prompt": "hello", "max_tokens": LONG, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        assert next(lines)
        yield lines


def wait_for_line(server: Served, words: str) -> None:
    while words not in server.log.read_text():
        assert server.process.poll() is None, server.log.read_text()


def test_the_banner_says_what_was_loaded(files: Path, tmp_path: Path) -> None:
    one = files / "adapters" / "one"
    with serving(tmp_path, *flags(files, "--adapter", f"first={one}", "--arena-rows", "64")) as server:
        log = server.log.read_text()
    for words in (
        "base: 2 layers",
        "nf4, 4.",
        "bits a weight",
        "KV_cache",
        "tokens in",
        "64 rows a module",
        "first",
    ):
        assert words in log
    assert CLOSED not in log, "whoever may ask may manage"


def test_ctrl_c_lets_streams_finish_and_refuses_new_ones(files: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *flags(files)) as server:
        with long_stream(server) as lines:
            server.interrupt()
            wait_for_line(server, "draining 1 running")
            ready = httpx.get(f"{server.url}/ready")
            assert (ready.status_code, ready.json()["reason"]) == (503, "the server drains")
            body = {"model": "base", "prompt": "hello"}
            refused = httpx.post(f"{server.url}/v1/completions", json=body)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert refused.headers["retry-after"]
            *events, done = lines
        assert done == "data: [DONE]"
        assert json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(timeout=20) == 0


def test_a_second_ctrl_c_stops_at_once(files: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *flags(files)) as server, long_stream(server) as lines:
        server.interrupt()
        wait_for_line(server, "draining")
        server.interrupt()
        assert server.process.wait(timeout=10) == 128 + signal.SIGINT
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)


@pytest.mark.usefixtures("logging_as_it_was")
def test_ctrl_c_while_the_base_loads_ends_at_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs this may ignore it
    loaded = []

    def load(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        loaded.append("to its end")

    monkeypatch.setattr("manylora.serve.assemble", load)
    with pytest.raises(KeyboardInterrupt):
        serve(ServeSettings(base=str(files / "base"), port=0))
    assert loaded == []
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_draining_ends_when_its_time_is_over(files: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *flags(files, "--drain-timeout", "0.2")) as server, long_stream(server) as lines:
        server.interrupt()
        *_, last = lines
        assert server.process.wait(timeout=20) == 0
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_a_hangup_drains_like_ctrl_c(files: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *flags(files)) as server, long_stream(server) as lines:
        server.process.send_signal(signal.SIGHUP)
        *_, last, done = lines
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(timeout=20) == 0


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """As `nohup` starts it."""
    server = DrainingServer(
        uvicorn.Config("nothing:here"), cast("Any", None), 1.0, lambda: None, cast("Any", None)
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server.capture_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == server.handle_exit
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("typed", "name"), [(".", "base"), ("..", "files"), ("../link", "link"), ("../base/", "base")]
)
def test_a_base_is_named_by_its_folder(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, name: str
) -> None:
    home = tmp_path / "files" / "base"
    home.mkdir(parents=True)
    (tmp_path / "files" / "link").symlink_to(home)
    monkeypatch.chdir(home)
    assert find_named_base(ServeSettings(base=typed))[1] == name


def test_a_name_that_is_given_is_kept(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "org").mkdir()
    monkeypatch.chdir(files)
    settings = ServeSettings(base=str(files / "base"), served_model_name="org/")
    assert find_named_base(settings) == (files / "base", "org/")
    with pytest.raises(StartError, match="--served-model-name"):
        find_named_base(ServeSettings(base="/"))


def test_files_that_were_passed_over_and_closed_admin_routes_are_told_at_start(
    files: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(files / "base", tmp_path / "base"))
    (base / "model.safetensors.index.json").write_text("{}")
    with serving(tmp_path, str(base), "--kv-cache-gib", "0.05", "--host", "0.0.0.0") as server:
        log = server.log.read_text()
    assert "model.safetensors.index.json is not read" in log
    assert CLOSED in log


def test_adapters_are_there_again_after_a_restart(files: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *flags(files)) as server:
        made = httpx.post(f"{server.url}/adapters", json={"name": "team/two", "src": "two"})
        assert made.status_code == 201
        before = answer(server, "team/two")
        assert before != answer(server, "base")
        server.interrupt()
        assert server.process.wait(timeout=20) == 0
    with serving(tmp_path, *flags(files)) as server:
        (found,) = httpx.get(f"{server.url}/adapters").json()["data"]
        assert (found["name"], found["id"]) == ("team/two", made.json()["id"])
        assert answer(server, "team/two") == before


def test_an_adapter_flag_takes_what_its_directory_holds_now(files: Path, tmp_path: Path) -> None:
    directory = tmp_path / "outside the root"
    shutil.copytree(files / "adapters" / "one", directory)
    arguments = flags(files, "--adapter", f"mine={directory}")
    with serving(tmp_path, *arguments) as server:
        before = answer(server, "mine")
    shutil.rmtree(directory)
    shutil.copytree(files / "adapters" / "two", directory)
    with serving(tmp_path, *arguments) as server:
        assert answer(server, "mine") != before
        (found,) = httpx.get(f"{server.url}/adapters").json()["data"]
        assert found["version"] == 2
        said = " ".join(server.log.read_text().split())
    assert f"adapter mine is {directory} from now on (version 2)" in said
    assert f"in --data-dir it was {directory} (version 1)" in said


def test_a_second_server_for_one_data_directory_ends_in_one_line(files: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *flags(files)) as first:
        command = [sys.executable, "-m", "manylora", "serve", *flags(files), "--port", "0"]
        second = subprocess.run(
            [*command, "--data-dir", str(first.data_dir)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert second.returncode == 2
        last = second.stderr.strip().splitlines()[-1]
        assert last.startswith("manylora: ")
        assert f"process {first.process.pid} serves" in last
        assert "Traceback" not in second.stderr
        assert httpx.get(f"{first.url}/ready").status_code == 200


def test_a_lost_registry_stops_the_start_until_it_is_said_otherwise(files: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *flags(files)) as server:
        httpx.post(f"{server.url}/adapters", json={"name": "two", "src": "two"}).raise_for_status()
        data = server.data_dir
        server.end()
    for path in data.glob("*/registry.db*"):
        path.unlink()
    arguments = ["serve", *flags(files), "--port", "0", "--data-dir", str(data)]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2
    assert "--start-anew" in ended.stderr.strip().splitlines()[-1]
    assert len(list(data.glob("*/adapters/*/adapter_model.safetensors"))) == 1
    with serving(tmp_path, *flags(files, "--start-anew")) as server:
        assert httpx.get(f"{server.url}/adapters").json()["data"] == []
    assert list(data.glob("*/adapters/*/adapter_model.safetensors")) == []


@pytest.mark.usefixtures("logging_as_it_was")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{files}/nowhere"], "there is no such directory"),
        (["{files}/adapters"], "config.json"),
        (["{files}/base", "--adapter", "x={files}/base"], "adapter_config.json"),
        (["{files}/base", "--adapter", "x={files}/gone"], "--adapter x="),
        (["{files}/base", "--data-dir", "{files}/base/config.json"], "--data-dir"),
        (["{files}/base", "--kv-cache-gib", "0.000001"], "--kv-cache-gib"),
        (["{files}/base", "--port", "{taken}"], "is another server there"),
        # Told before anything is loaded: neither base is there.
        (["{files}/nowhere", "--port", "{taken}"], "is another server there"),
        (["{files}/base", "--max-model-len", "4096"], "--max-model-len 4,096: the base has 1,024 positions"),
        (
            ["{files}/base", "--max-model-len", "1000", "--kv-cache-gib", "0.0001"],
            "KV tokens: give more with --kv",
        ),
        (["{files}/base", "--kv-cache-gib", "100000", "--max-running", "100000000"], "that are free"),
        (["{files}/base", "--arena-rows", "100000000000"], "that are free"),
    ],
)
def test_what_cannot_be_served_ends_in_one_line(
    files: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = [argument.format(files=files, taken=port) for argument in arguments]
        if "--port" not in arguments:
            given += ["--port", "0"]  # what runs on this machine meanwhile is nothing to this
        if "--data-dir" not in arguments:
            given += ["--data-dir", str(tmp_path)]
        ended = CliRunner().invoke(app, ["serve", *given])
    assert ended.exit_code == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("manylora: ")


def test_adapters_are_managed_from_the_command_line(files: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *flags(files, "--admin-key", "secret", "--host", "0.0.0.0")) as server:
        assert CLOSED not in server.log.read_text()

        def adapters(*arguments: str, key: str = "secret") -> Result:
            environment = {"MANYLORA_ADMIN_KEY": key, "COLUMNS": "200"}
            return CliRunner(env=environment).invoke(app, ["adapters", *arguments, "--url", server.url])

        assert "serves mine, version 1, rank 4" in adapters("add", "mine", "one").stdout
        assert "serves mine, version 2, rank 8" in adapters("replace", "mine", "two").stdout
        assert "mine" in adapters("list").stdout
        assert json.loads(adapters("list", "--json").stdout)["data"][0]["version"] == 2
        assert adapters("remove", "mine").stdout.startswith("removed mine: ")
        for wrong in (
            adapters("remove", "mine"),
            adapters("add", "x", "../base"),
            adapters("list", key="guess"),
        ):
            assert wrong.exit_code == 2
            assert wrong.stderr.startswith("manylora: ")
            assert len(wrong.stderr.splitlines()) == 1
    command = [sys.executable, "-m", "manylora", "adapters", "list", "--url", server.url]
    gone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (gone.returncode, len(gone.stderr.splitlines())) == (2, 1)
    assert "no server answers" in gone.stderr


def test_ctrl_c_ends_a_server_whose_templates_burn(files: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb"
    shutil.copytree(files / "adapters" / "one", bomb)
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    (bomb / "chat_template.jinja").write_text(loops)
    body = {"model": "bomb", "messages": [{"role": "user", "content": "x"}]}
    more = ("--adapter", f"bomb={bomb}", "--drain-timeout", "1", "--template-timeout", "100")
    with serving(tmp_path, *flags(files, *more)) as server, ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=body, timeout=60)
            for _ in range(8)
        ]
        # Threads that tokenise are free, however many templates burn.
        assert answer(server, "base")
        assert not any(each.done() for each in asked)
        server.process.terminate()
        assert server.process.wait(timeout=20) == 0
        for each in asked:
            assert each.exception(timeout=20) is not None or each.result().status_code >= 400

"""`bench peers` as it is typed, with peers that are fakes: they are started, asked, told apart and ended."""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from manylora.loadtest.bench.beside_peft import Files
from manylora.loadtest.bench.cli import app
from manylora.loadtest.bench.peers.files import GgufFiles, PeerError
from manylora.loadtest.bench.peers.report import peers_text
from manylora.loadtest.bench.peers.run import Peers, run_peers
from manylora.loadtest.bench.peers.scenes import SCENES
from manylora.loadtest.bench.peers.servers import LlamaCpp, Started
from tests.loadtest.fake_server import FakeServer, running

ROOT = Path(__file__).resolve().parents[4]
SERVER = """#!{python}
import shutil, sys
sys.path.insert(0, {root!r})
words = sys.argv[1:]
def after(flag, default=""):
    return words[words.index(flag) + 1] if flag in words else default
if "--version" in words:
    print("version: 4321 (abcdef)", file=sys.stderr)
elif "-lv" in words:
    sys.exit("system_info: n_threads = 2 / 2 | CPU : SSE3 = 1 | AVX512 = 1 | AMX_INT8 = 0 |")
elif words[0] == "-c":
    print("0.32.0+cpu|torch|2.13.0|AVX512")
else:
    import uvicorn
    from tests.loadtest.fake_server import FakeServer
    lora = tuple(filter(None, after("--lora").split(",")))
    open({log!r}, "a").write(" ".join(words) + chr(10))
    uvicorn.run(FakeServer(lora=lora).app(), port=int(after("--port")), log_level="critical")
"""
CONVERTER = "import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('gguf')"
QUANTIZE = "#!/bin/sh\ncp $2 $3\n"


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    text = SERVER.format(python=sys.executable, root=str(ROOT), log=str(tmp_path / "started.txt"))
    for name, content in (("llama-server", text), ("python", text), ("llama-quantize", QUANTIZE)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (tmp_path / name).write_text(CONVERTER)
    return tmp_path


def test_peers_are_measured_one_after_the_other_and_ended(fakes: Path) -> None:
    words = ["--llama-server", str(fakes / "llama-server"), "--llama-source", str(fakes), "--no-peft"]
    words += ["--vllm", str(fakes / "python"), "--model", "tiny", "--each", "1", "--scene", "1, adapter"]
    words += ["--keep", str(fakes / "kept"), "--json", str(fakes / "report.json")]
    done = CliRunner().invoke(app, ["peers", *words])
    assert done.exit_code == 0, done.output
    assert "llama.cpp: 4321 (abcdef); computes with SSE3 AVX512" in done.output
    assert "vLLM: 0.32.0+cpu torch 2.13.0 AVX512; computes with AVX512" in done.output
    assert "1, adapter: ms a token" in done.output
    report = json.loads((fakes / "report.json").read_text())
    assert {each["peer"] for each in report["results"]} == {"manylora", "llama.cpp", "vLLM"}
    assert all(each["errors"] == 0 and each["seconds_per_token"] > 0 for each in report["results"])
    assert [(bar["scene"], bar["limit"]) for bar in report["bars"]] == [("1, adapter", 0.7)]
    assert report["bars"][0]["ratio"] > 0
    llama, vllm = (fakes / "started.txt").read_text().splitlines()
    assert f"--lora {fakes}/kept/adapter0.gguf --lora-init-without-apply" in llama
    assert f"--enable-lora --max-loras 1 --max-lora-rank 16 --lora-modules adapter0={fakes}" in vllm
    lines = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not any(str(fakes) in " ".join(line or ()) for line in lines), "all are ended"


class Broken:
    """A peer that doesn't start."""

    name = "llama.cpp"
    base_apart = True

    def version(self) -> str:
        return "1"

    def start(self, *, adapters: bool) -> AbstractContextManager[Started]:
        raise PeerError("llama.cpp did not start: no such instruction")


class Fine:
    """One that runs already."""

    name = "manylora"
    base_apart = False

    def __init__(self, url: str) -> None:
        self.url = url
        self.starts = 0

    def version(self) -> str:
        return "2"

    def start(self, *, adapters: bool) -> AbstractContextManager[Started]:
        self.starts += 1
        return nullcontext(Started(self.url, "openai", "base", ("good",) * 8, "AVX2"))


def test_a_peer_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    told: list[str] = []
    with running(FakeServer()) as fake:
        files = Files(tmp_path, (), tmp_path)
        fine = Fine(fake.url)
        setting = Peers((Broken(), fine), files, SCENES[:2], "nf4", 1, with_peft=False)
        ran = run_peers(setting, told.append)
    assert ran.failed == {"llama.cpp": "llama.cpp did not start: no such instruction"}
    assert ran.versions["manylora"] == "2; computes with AVX2"
    assert list(ran.results) == [("manylora", "1, base"), ("manylora", "1, adapter")]
    assert fine.starts == 1, "for its base it needs no server of its own"
    said = peers_text(setting, ran)
    assert "llama.cpp was not measured to the end: llama.cpp did not start: no such instruction" in said
    assert "1, base: ms a token" in said
    assert "llama.cpp: llama.cpp did not start: no such instruction" in told


def test_a_server_that_ends_at_once_is_told_with_its_last_words(fakes: Path) -> None:
    (fakes / "llama-server").write_text("#!/bin/sh\necho no such instruction >&2; exit 1\n")
    gguf = GgufFiles(fakes / "base.gguf", ())
    peer = LlamaCpp(fakes / "llama-server", gguf, fakes, streams=1, context=128, threads=1)
    with pytest.raises(PeerError, match="did not start: no such instruction"), peer.start(adapters=False):
        pass


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--llama-server", "x"], "--llama-server needs --llama-source"),
        (["--scene", "9, base"], "there are 1, base; 1, adapter"),
        (["--model", "huge"], "there are tiny"),
    ],
)
def test_bad_input_is_one_line_and_2(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["peers", *words])
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_what_converters_lack_is_said(fakes: Path) -> None:
    (fakes / "convert_hf_to_gguf.py").write_text("import no_such_thing")
    words = ["--llama-server", str(fakes / "llama-server"), "--llama-source", str(fakes), "--model", "tiny"]
    done = CliRunner().invoke(app, ["peers", *words, "--scene", "1, base", "--no-peft"])
    assert done.exit_code == 2
    assert "convert_hf_to_gguf.py failed: ModuleNotFoundError" in done.output
    assert "--llama-python" in done.output
    (fakes / "llama-quantize").unlink()
    done = CliRunner().invoke(
        app, ["peers", *words, "--scene", "1, base", "--no-peft"], env={"PATH": str(fakes / "nothing")}
    )
    assert done.exit_code == 2
    assert "no llama-quantize" in done.output

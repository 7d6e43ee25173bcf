"""A result is there whole or not at all: killed at any moment, out of space, or overtaken."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manylora.adapters.export.archive import archived_files
from manylora.adapters.export.errors import ExportFailed, ExportRefused
from manylora.adapters.export.export import export
from manylora.adapters.export.publish import PARTIAL, publishing, sweep, sweep_all
from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter
from tests.adapters.export.making import make_base, settings

ROOT = Path(__file__).resolve().parents[3]
# Runs an export and kills its own process at the n-th sign of progress, or just before the result is put in place.
KILLED = """
import os, signal, sys
from pathlib import Path
from manylora.adapters.export import publish
from manylora.adapters.export.export import export
from manylora.adapters.export.settings import ExportSettings
adapter, base, output, form, moment = sys.argv[1:]
seen = 0
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def progress(doing, share):
    global seen
    seen += doing == moment
    if seen == 3:
        die()
if moment == "put":
    publish._put = die
export(ExportSettings(Path(adapter), Path(output), Path(base), form), progress)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    make_base(root / "base")
    write_adapter(root / "adapter", root / "base", AdapterShape(rank=4))
    return root


@pytest.mark.parametrize(
    ("form", "moment"),
    [("merged", "writing"), ("merged", "checking"), ("merged-4bit", "put"), ("peft", "put")],
)
def test_killed_at_any_moment_nothing_is_taken_for_a_result(
    tmp_path: Path, made: Path, form: str, moment: str
) -> None:
    out = tmp_path / ("out.zip" if form == "peft" else "out")
    arguments = [str(made / "adapter"), str(made / "base"), str(out), form, moment]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(PARTIAL)
    export(settings(made / "base", made / "adapter", out, format=form))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_partial_result_whose_process_lives_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out[1]"
    with publishing(out) as partial:
        (partial / "file").write_text("x")
        assert sweep(out) == 0
        assert sweep_all(tmp_path) == 0
        assert partial.is_dir()
    assert (out / "file").read_text() == "x"
    dead = tmp_path / f"{PARTIAL}out[1]-0"
    dead.mkdir()
    other = tmp_path / f"{PARTIAL}out-0"
    other.mkdir()
    assert sweep(out) == 1
    assert not dead.exists()
    assert other.exists()
    assert sweep_all(tmp_path) == 1


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportRefused, match="exists"), publishing(out):
        out.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A result that is there after a power cut is whole."""
    out = tmp_path / ("out.zip" if form == "peft" else "out")
    before, after = set[Path](), set[Path]()
    sync = os.fsync

    def noted(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        (after if out.exists() else before).add(path)
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    export(settings(made / "base", made / "adapter", out, format=form))
    [partial] = {path for path in before if path.name in ("out", "out.zip")} or {
        path for path in before if path.name.startswith(PARTIAL)
    }
    assert before >= {partial / path.relative_to(out) for path in out.rglob("*")}
    assert after == {tmp_path}


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with publishing(tmp_path / "out") as partial:
            (partial / "half").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ExportFailed, match="is full"):
        fill()
    assert list(tmp_path.iterdir()) == []


def run_process(values: dict[str, object]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "manylora.adapters.export", json.dumps(values), "0"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_the_process_speaks_json_lines(tmp_path: Path, made: Path) -> None:
    asked = settings(made / "base", made / "adapter", tmp_path / "out")
    with run_process(asked.to_json()) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = [json.loads(line) for line in process.stdout]
        assert process.wait(60) == 0
    assert "manylora" in said[-1]["result"]
    assert all(set(line) == {"stage", "progress"} for line in said[:-1])
    with run_process(asked.to_json()) as process:
        assert process.stdout is not None
        assert "exists" in json.loads(process.stdout.read())["error"]
        assert process.wait(60) == 2


@pytest.mark.parametrize("how", ["parent", "terminate"])
def test_the_process_ends_with_its_parent_and_when_told(tmp_path: Path, made: Path, how: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    os.mkfifo(base / "config.json")  # the export waits here for ever
    asked = settings(base, made / "adapter", tmp_path / "out")
    with run_process(asked.to_json()) as process:
        assert process.stdin is not None
        time.sleep(0.1)
        if how == "parent":
            process.stdin.close()
        else:
            process.terminate()
        assert process.wait(60) != 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".zip"])
def test_archives_depend_on_the_adapters_files_alone(tmp_path: Path, made: Path, suffix: str) -> None:
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    for path in (one, other):
        export(settings(made / "base", made / "adapter", path, format="peft"))
        for name in archived_files(made / "adapter"):
            os.utime(made / "adapter" / name, (1, 1))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(ExportRefused, match="archive's name"):
        export(settings(made / "base", made / "adapter", tmp_path / "one.rar", format="peft"))

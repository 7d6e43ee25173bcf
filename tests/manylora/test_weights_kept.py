"""A server's next start maps the weights that the first prepared, and answers the same."""

from pathlib import Path

import pytest
import torch

from manylora.base import DEMO, load_base
from manylora.server.config import ServeSettings
from manylora.server.kernels.choose import choose_backend
from manylora.server.model.weight_cache import WEIGHTS
from tests.serving import answer, serving

NATIVE = choose_backend(torch.device("cpu"), torch.bfloat16).keeper is not None


def settings(tmp_path: Path, **more: object) -> ServeSettings:
    return ServeSettings.model_validate({"data_dir": tmp_path, **more})


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
def test_the_next_start_maps_what_the_first_prepared(tmp_path: Path) -> None:
    with serving(tmp_path, "--kv-cache-gib", "0.1") as server:
        assert "layers, loaded in" in server.log.read_text()
        first = answer(server, "demo")
        while not list((server.data_dir / WEIGHTS).glob("*.weights")):
            log = server.log.read_text()
            assert server.process.poll() is None, log
            assert "can't be kept" not in log, log
    with serving(tmp_path, "--kv-cache-gib", "0.1") as server:
        assert "layers, mapped in" in server.log.read_text()
        assert answer(server, "demo") == first
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert any(" r--s " in line and line.endswith(".weights") for line in maps.splitlines())


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
def test_a_broken_file_costs_time_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def load() -> bool:
        base = load_base(settings(tmp_path), DEMO / "base", lambda done, total: None)
        assert base.cache is not None
        base.cache.write()
        return base.report.mapped

    assert [load(), load()] == [False, True]
    [kept] = (tmp_path / WEIGHTS).iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    assert not load()
    assert "thrown away and made anew" in caplog.text
    assert load()


def test_nothing_is_kept_where_that_is_switched_off(tmp_path: Path) -> None:
    base = load_base(settings(tmp_path, weight_cache=False), DEMO / "base", lambda done, total: None)
    assert base.cache is None
    assert not list(tmp_path.iterdir())

"""The table of the native kernels' rates, over small matrices."""

import pytest

from manylora.loadtest.bench import kernels
from manylora.loadtest.bench.kernels import FORMS, Limits, Rate
from manylora.server.kernels.cpu.library import Unavailable, load_library


def test_a_share_is_that_of_the_nearer_limit() -> None:
    limits = Limits(bytes_a_second=1000, multiply_adds_a_second=10_000)
    assert Rate((10, 10), rows=1, nbytes=100, seconds=1).share(limits) == 0.1
    assert Rate((10, 10), rows=50, nbytes=100, seconds=1).share(limits) == 0.5


@pytest.mark.skipif(isinstance(load_library(), Unavailable), reason="there are no native kernels here")
@pytest.mark.parametrize("form", FORMS)
def test_each_form_has_its_table(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "STREAMED", 1 << 20)
    monkeypatch.setattr(kernels, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(kernels, "DOT_ROUNDS", 100)
    arguments = ["kernels", "--form", form, "--shapes", "96x128", "--rows", "1", "70", "--times", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    kernels.main()
    printed = capsys.readouterr().out
    assert "GB/s, integer dots" in printed
    assert printed.count(f"{form} 96x128") == 2

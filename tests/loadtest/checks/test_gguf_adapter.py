"""The check of exported adapters in llama.cpp: what is told where that isn't there, and how answers are judged."""

from dataclasses import replace
from pathlib import Path

import pytest

from manylora import demo
from manylora.loadtest.checks import gguf_adapter
from manylora.loadtest.checks.gguf_adapter import Judged, judge, main
from manylora.loadtest.material.checkpoints import TINY

BASE = Path(demo.__file__).parent / "base"


def test_without_llama_cpp_it_is_skipped_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    assert "skipped: name llama.cpp with --llama-server" in capsys.readouterr().out
    words = [
        "--llama-server",
        f"{tmp_path}/none",
        "--llama-source",
        str(tmp_path),
        "--tokenizer",
        str(tmp_path),
    ]
    assert main(words) == 0
    assert "none is not there" in " ".join(capsys.readouterr().out.split())


def test_a_converter_that_fails_fails_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_adapter, "SHAPES", (replace(TINY, vocab_size=1100),))
    server, converter = tmp_path / "llama-server", tmp_path / "convert_hf_to_gguf.py"
    server.write_text("")
    converter.write_text("import no_such_thing")
    words = ["--llama-server", str(server), "--llama-source", str(tmp_path)]
    for tokenizer, says in ((BASE, "ModuleNotFoundError"), (tmp_path / "none", "can't be checked")):
        assert main([*words, "--tokenizer", str(tokenizer)]) == 1
        assert says in capsys.readouterr().out


def test_an_answer_is_ours_as_long_as_each_token_is_the_most_likely() -> None:
    assert judge([1, 2, 3], [-0.5, -1.0, -2.0], [-0.5, -1.0, -2.0]) == Judged((1, 2, 3), None)
    assert judge([1, 2, 3], [-0.5, -1.5, -2.0], [-0.5, -1.0, -1.0]) == Judged((1, 2, 3), 1, 0.5)

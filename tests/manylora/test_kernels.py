"""Native CPU kernels as whoever starts the server sees them: chosen, refused, or missed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from manylora import doctor, pools
from manylora.base import DEMO, kernels_for, load_base
from manylora.cli import app
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.pools import measure
from manylora.server.config import ServeSettings
from manylora.server.kernels.choose import COST
from manylora.server.kernels.cpu.build import LEVELS
from manylora.server.kernels.cpu.library import Unavailable, load_library
from manylora.server.kernels.plain import PlainBackend
from tests.serving import serving

_found = load_library()
RUNS = () if isinstance(_found, Unavailable) else _found.runs


@pytest.mark.parametrize("kernels", ["plain", *RUNS[-1:]])
def test_the_banner_says_by_what_is_multiplied(tmp_path: Path, kernels: str) -> None:
    flags = ("--kernels", kernels, "--threads", "2", "--kv-cache-gib", "0.05", "--kv-cache-dtype", "int8")
    with serving(tmp_path, *flags) as server:
        said = server.log.read_text()
    assert "MiB, int8" in said
    assert ("torch" if kernels == "plain" else f"native {kernels}, int8 activations, threads: 2") in said
    assert "no native CPU kernels" not in said  # it was asked for


def test_kernels_that_can_t_be_had_end_the_start_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = next(level.name for level in LEVELS if level.name not in RUNS)
    for words, variable, where in (
        (["--kernels", lacking], "", "--kernels"),
        ([], lacking, "MANYLORA_KERNELS"),
    ):
        monkeypatch.setenv("MANYLORA_KERNELS", variable)
        ended = CliRunner().invoke(app, ["serve", "--port", "0", "--data-dir", str(tmp_path), *words])
        assert ended.exit_code == 2
        assert f"{where} {lacking}: " in ended.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("settings", "dtype", "chosen"),
    [
        ({}, torch.bfloat16, "auto"),
        ({}, torch.float32, "auto"),
        ({"quantization": "int8"}, torch.float32, "auto"),
        ({"quantization": "none"}, torch.bfloat16, "auto"),
        ({"dtype": "bfloat16"}, torch.bfloat16, "auto"),
        # What follows is finer than the native kernels are.
        ({"quantization": "none"}, torch.float32, "plain"),
        ({"dtype": "float32"}, torch.float32, "plain"),
        ({"dtype": "float16"}, torch.float16, "plain"),
        ({"exact": True}, torch.bfloat16, "plain"),
        ({"kernels": "avx2", "dtype": "float32"}, torch.float32, "avx2"),
        ({"kernels": "plain", "exact": True}, torch.bfloat16, "plain"),
    ],
)
def test_native_kernels_do_not_take_what_is_asked_for_finer(
    settings: dict[str, Any], dtype: torch.dtype, chosen: str
) -> None:
    assert kernels_for(ServeSettings(**settings), dtype, DEMO / "base") == chosen


@pytest.mark.parametrize("also", [{"exact": True}, {"kernels": "plain"}])
def test_activations_of_plain_torch_are_a_contradiction(also: dict[str, Any]) -> None:
    settings = ServeSettings(activations="bfloat16", **also)
    with pytest.raises(
        ValueError, match="activations is for native kernels; plain torch has those of --dtype"
    ):
        kernels_for(settings, torch.bfloat16, DEMO / "base")


def test_the_banner_says_by_what_weights_are_multiplied() -> None:
    if not RUNS:
        pytest.skip("no native kernels")
    settings = ServeSettings(activations="bfloat16", threads=1, weight_cache=False)
    base = load_base(settings, DEMO / "base", lambda *_: None)
    assert base.decoder.backend.description == f"native {RUNS[0]}, bfloat16 activations, threads: 1"


def test_exact_native_kernels_are_a_contradiction() -> None:
    with pytest.raises(ValueError, match="exact computes in plain torch: leave out --kernels"):
        kernels_for(ServeSettings(exact=True, kernels="avx2"), torch.bfloat16, DEMO / "base")


@pytest.mark.parametrize("kernels", ["plain", *RUNS[-1:]])
def test_the_type_of_keys_and_values_decides_how_many_blocks_fit(kernels: str) -> None:
    found = {}
    for kept in ("auto", "bfloat16", "int8"):
        settings = ServeSettings(
            kernels=kernels, kv_cache_dtype=kept, kv_cache_gib=1 / 64, dtype="float32", weight_cache=False
        )
        base = load_base(settings, DEMO / "base", lambda *_: None)
        sizes = measure(settings, base, 1024)
        kv = base.decoder.new_kv(sizes.num_blocks, settings.block_size)
        assert kv.nbytes == sizes.kv_bytes <= 1 << 24
        found[kept] = (base.kv_dtype, sizes.num_blocks)
    # Four layers, four KV heads of 32: 32 KiB a block of 16 in two bytes; in one, a scale of two for each 32.
    assert found["int8"] == ("int8", (1 << 24) // (17 << 10) - 1)
    assert found["bfloat16"] == ("bfloat16", (1 << 24) // (32 << 10) - 1)
    auto = "float32" if kernels == "plain" else "bfloat16"
    assert found["auto"] == (auto, (1 << 24) // ((64 if kernels == "plain" else 32) << 10) - 1)


def test_what_adapters_may_have_beside_the_arena_is_reckoned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "free_memory", lambda device: 1 << 30)
    settings = ServeSettings(kernels="plain", kv_cache_gib=1 / 64, arena_rows=64, weight_cache=False)
    base = load_base(settings, DEMO / "base", lambda *_: None)
    measure(settings, base, 1024)
    elsewhere = replace(base, device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"1\.00 GiB of adapters' embeddings and heads .* --vocabulary-gib"):
        measure(settings, elsewhere, 1024)
    measure(settings.model_copy(update={"vocabulary_gib": 0.5}), elsewhere, 1024)


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_exact_answers_need_keys_and_values_as_they_are_computed(kept: str) -> None:
    settings = ServeSettings(exact=True, kv_cache_dtype=kept)
    with pytest.raises(ValueError, match=f"--exact keeps .*: leave out --kv-cache-dtype {kept}"):
        load_base(settings, DEMO / "base", lambda *_: None)


def test_the_doctor_names_the_level_or_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if RUNS:
        (finding,) = (found for found in doctor.examine() if found.what == "native CPU kernels")
        assert finding.verdict == "ok"
        assert finding.detail.startswith(RUNS[0])
        assert all(level in finding.detail for level in RUNS)
        assert "int8 activations (--activations bfloat16: " in finding.detail
    monkeypatch.setattr(doctor, "sound_kernels", lambda: Unavailable("they weren't compiled"))
    (finding,) = (found for found in doctor.examine() if found.what == "native CPU kernels")
    assert finding.verdict == "slow"
    assert "weren't compiled" in finding.detail
    assert COST in finding.detail


def test_a_base_that_they_do_not_take_is_served_by_torch_and_that_is_said(tmp_path: Path) -> None:
    """NF4's blocks of 64 weights run over the ends of rows of 96."""
    base = write_base(tmp_path / "base", replace(TINY, hidden_size=96))
    odd = ServeSettings(base=str(base))
    loaded = load_base(odd, base, lambda *_: None)
    assert isinstance(loaded.decoder.backend, PlainBackend)
    if not RUNS:
        pytest.skip("no native kernels")
    assert loaded.why_plain is not None
    assert "don't take this base: blocks of 64 weights run over the ends of rows of 96" in loaded.why_plain
    with pytest.raises(ValueError, match=f"--kernels {RUNS[0]}: blocks of .* --kernels plain takes it"):
        load_base(odd.model_copy(update={"kernels": RUNS[0]}), base, lambda *_: None)

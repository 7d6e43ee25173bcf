"""The table of the native kernels' rates, over small matrices and a small decoder."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from manylora.loadtest.bench import kernels, limits
from manylora.loadtest.bench.cli import app
from manylora.loadtest.bench.kernels import KernelsBench, Rate, kernels_text, measure
from manylora.loadtest.bench.limits import Limits, Work
from manylora.loadtest.bench.op_rates import LINEAR_OPS, OPS, op_seconds, op_work
from manylora.loadtest.material.checkpoints import TINY
from manylora.loadtest.material.decode_steps import decode_step, place_adapters
from manylora.loadtest.material.engines import served
from manylora.loadtest.material.random_model import ModelChoice, build_decoder
from manylora.server.kernels.cpu.library import Unavailable, load_library

NATIVE = pytest.mark.skipif(
    isinstance(load_library(), Unavailable), reason="there are no native kernels here"
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels, limits):
        monkeypatch.setattr(module, "STREAMED", 1 << 20)
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(limits, "DOT_ROUNDS", 100)
    monkeypatch.setattr(limits, "FLOAT_SIZE", 32)


def test_a_share_is_that_of_the_nearer_limit() -> None:
    machine = Limits(bytes_a_second=1000, multiply_adds_a_second=10_000, floats_a_second=100)
    assert machine.share(Work(100, 100), 1) == 0.1
    assert machine.share(Work(100, 5000), 1) == 0.5
    assert machine.share(Work(100, 5000, 25), 1) == 0.75
    assert Rate("x", 4, Work(100, 5000), 0.5).cells(machine)[-2:] == ["100%", "arithmetic"]
    assert Rate("x", 4, Work(100), 0.5).cells(machine)[-2:] == ["20%", "memory"]


@NATIVE
def test_everything_has_its_line(small: None) -> None:
    bench = KernelsBench(shapes=("96x128",), rows=(1, 70), times=1, context=48, base=TINY, head=(320, 128))
    opened, machine, rates = measure(bench)
    names = [(rate.name, rate.rows) for rate in rates]
    for form in ("nf4 96x128", "int8 96x128", "bf16 96x128", "head 320x128"):
        assert [(form, 1), (form, 70)] == [each for each in names if each[0] == form]
    assert ("adapters of rank 16, each its own", 70) in names
    assert all((f"attention, {kept}, prompt to 48", 48) in names for kept in ("bfloat16", "int8"))
    assert all(0 < machine.share(rate.work, rate.seconds) < math.inf for rate in rates)
    by_name = {rate.name: rate.work for rate in rates if rate.rows == 70}
    # Codes of 4 bits with a scale per 64, of 8 bits, and 16-bit weights.
    assert 0.5 * 96 * 128 < by_name["nf4 96x128"].nbytes < by_name["int8 96x128"].nbytes
    assert by_name["int8 96x128"].nbytes < by_name["bf16 96x128"].nbytes
    assert by_name["nf4 96x128"].multiply_adds == 96 * 128 * 70
    assert "GB/s, integer dots" in kernels_text(opened, machine, rates)


@NATIVE
def test_the_command_prints_and_writes(small: None, tmp_path: Path) -> None:
    words = [
        "kernels",
        "--only",
        "linear",
        "--form",
        "nf4",
        "--shape",
        "96x128",
        "--rows",
        "1",
        "--times",
        "1",
    ]
    done = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    assert "nf4 96x128" in done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert [rate["name"] for rate in report["rates"]] == ["nf4 96x128"]
    assert report["limits"]["bytes_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "softmax"], "there are linear, head, attention, lora"),
        (["--form", "nf5"], "there are nf4, int8, bf16"),
        (["--rows", "0"], "begin at 1"),
        (["--rows", "x"], "x"),
        (["--level", "mmx"], "mmx"),
    ],
)
def test_bad_input_is_one_line_and_2(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["kernels", *arguments])
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_the_least_work_of_ops_is_what_their_definition_says() -> None:
    """TINY: hidden 128, MLP 192, 2 layers, 4 heads of 32, 2 KV heads, vocabulary 320; 3 rows of 2 tokens at 20."""
    model = served(build_decoder(ModelChoice("tiny", "none", "float32", kernels="plain")), 3, 20, 12)
    adapters = place_adapters(model, [4, 8])
    bare = op_work(model, decode_step(model, 3, 20, [], 2))
    used = op_work(model, decode_step(model, 3, 20, adapters, 2))
    assert bare["attn_in"].integer == 2 * 6 * 128 * (128 + 64 + 64)
    assert bare["mlp_out"].integer == 2 * 6 * 128 * 192
    assert bare["head"].integer == 3 * 320 * 128
    # Two layers, keys and values of 20 tokens, 64 wide, 4 bytes, 3 rows; tokens see 19 and 20.
    assert bare["attend"].nbytes == 2 * 2 * 20 * 64 * 4 * 3
    assert bare["attend"].real == 2 * 2 * 3 * (19 + 20) * 128
    # Both adapters are read once; rows 0 and 2 use the first, of rank 4, row 1 the second, of rank 8.
    down = 128 + 192
    assert used["mlp_out"].nbytes - bare["mlp_out"].nbytes == 2 * 2 * (4 + 8) * down
    assert used["mlp_out"].real == 2 * down * (4 * 4 + 8 * 2)
    assert used["attend"] == bare["attend"]
    assert used["head"] == bare["head"]


def test_every_op_is_timed() -> None:
    model = served(build_decoder(ModelChoice("tiny", "none", "float32", kernels="plain")), 2, 8, 1)
    with torch.inference_mode():
        seconds = op_seconds(model, decode_step(model, 2, 8, []), 2)
    assert tuple(seconds) == OPS
    assert set(LINEAR_OPS) < set(OPS)
    assert np.all(np.array([*seconds.values()]) > 0)

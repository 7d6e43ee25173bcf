"""The check of the native kernels' distributions, on the demo's base and few tokens."""

from pathlib import Path

import pytest
import torch

from manylora import demo
from manylora.loadtest.checks.fidelity import BARS, KV_INT8, Fidelity, compare, measure, texts
from manylora.loadtest.material.by_hand import load
from manylora.server.kernels.choose import choose_backend
from manylora.server.kernels.plain import PlainBackend

BASE = Path(demo.__file__).parent / "base"
CPU = torch.device("cpu")
PROMPTS = [[token % 500 for token in text.encode()[:60]] for text in texts()[:2]]


def test_native_kernels_are_near_and_other_weights_are_not() -> None:
    native = choose_backend(CPU, torch.float32)
    if isinstance(native, PlainBackend):
        pytest.skip("no native kernels")
    plain = load(BASE, PlainBackend(CPU, torch.float32), 1, "nf4")
    near = measure(plain, load(BASE, native, 1, "nf4"), PROMPTS)
    assert near.positions == 120
    assert near.kl < 0.004
    assert near.same > 0.9
    finer = choose_backend(CPU, torch.float32, activations="bfloat16")
    nearer = measure(plain, load(BASE, finer, 1, "nf4"), PROMPTS)
    assert nearer.kl < 0.5 * near.kl
    assert (BARS["int8"].kl, BARS["bfloat16"].kl) == (0.004, 0.001)
    itself = measure(plain, plain, PROMPTS)
    assert (itself.kl, itself.same, itself.ours) == (0, 1, itself.theirs)
    assert itself.holds(BARS["int8"])
    other = measure(plain, load(BASE, native, 1, "none"), PROMPTS)
    assert other.kl > 10 * near.kl
    assert not other.holds(BARS["int8"])


def test_keys_and_values_in_8_bits_are_a_row_of_their_own() -> None:
    if isinstance(choose_backend(CPU, torch.float32), PlainBackend):
        pytest.skip("no native kernels")
    (_, native, _), (names, kept, bars) = compare(BASE, "nf4", "int8", PROMPTS)
    assert (names, bars) == (["nf4", "int8", "int8"], KV_INT8)
    assert kept.positions == 120
    assert kept.theirs == native.ours
    assert 0 < kept.kl < KV_INT8.kl


@pytest.mark.parametrize(
    ("kl", "same", "native", "holds"),
    [(0.004, 0.96, 10.049, True), (0.0041, 1, 10, False), (0, 0.95, 10, False), (0, 1, 10.06, False)],
)
def test_each_bar_counts(kl: float, same: float, native: float, holds: bool) -> None:
    assert Fidelity(100, kl, same, 10.0, native).holds(BARS["int8"]) is holds

"""The check of the native kernels' distributions, on the demo's base and few tokens."""

from pathlib import Path

import pytest
import torch

from manylora import demo
from manylora.loadtest.checks.fidelity import Fidelity, measure, texts
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
    nearer = measure(plain, load(BASE, finer, 1, "nf4"), PROMPTS, "bfloat16")
    assert nearer.kl < 0.5 * near.kl
    assert (near.most_kl, nearer.most_kl) == (0.004, 0.001)
    itself = measure(plain, plain, PROMPTS)
    assert (itself.kl, itself.same, itself.native) == (0, 1, itself.plain)
    assert itself.holds
    other = measure(plain, load(BASE, native, 1, "none"), PROMPTS)
    assert other.kl > 10 * near.kl
    assert not other.holds


@pytest.mark.parametrize(
    ("kl", "same", "native", "holds"),
    [(0.004, 0.96, 10.049, True), (0.0041, 1, 10, False), (0, 0.95, 10, False), (0, 1, 10.06, False)],
)
def test_each_bar_counts(kl: float, same: float, native: float, holds: bool) -> None:
    assert Fidelity(100, kl, same, 10.0, native).holds is holds

"""Which backend is chosen, and what is said where it isn't the fastest."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from manylora.server.kernels import choose
from manylora.server.kernels.choose import choose_backend, leave_cores_to, what_is_missing
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.kernels.cpu.build import LEVELS
from manylora.server.kernels.cpu.library import KernelsRefused, Unavailable, load_library
from manylora.server.kernels.cpu.run import CpuStep
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.plain import PlainBackend

CPU, FLOAT = torch.device("cpu"), torch.float32
_found = load_library()
RUNS = () if isinstance(_found, Unavailable) else _found.runs
native = pytest.mark.skipif(not RUNS, reason="no native kernels")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    none = Unavailable("they weren't compiled")
    monkeypatch.setattr(choose, "load_library", lambda: none)
    monkeypatch.setattr(choose, "open_kernels", lambda *_: none)


@native
def test_a_cpu_has_native_kernels_the_fastest_that_it_runs() -> None:
    backend = choose_backend(CPU, FLOAT)
    assert isinstance(backend, CpuBackend)
    assert f"native {RUNS[0]}" in backend.description
    assert what_is_missing(backend, "auto") is None


@native
@pytest.mark.parametrize("level", RUNS)
def test_a_level_can_be_named_and_so_can_the_threads(level: str) -> None:
    assert choose_backend(CPU, FLOAT, level, 3).description == f"native {level}, int8 activations, threads: 3"


@native
def test_threads_are_as_many_as_torch_has_where_those_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert choose_backend(CPU, FLOAT).description.endswith("threads: 1")


def test_plain_is_torch_and_nobody_wonders() -> None:
    backend = choose_backend(CPU, FLOAT, "plain")
    assert isinstance(backend, PlainBackend)
    assert what_is_missing(backend, "plain") is None


def test_without_kernels_torch_computes_and_it_is_said_why_and_what_it_costs(no_kernels: None) -> None:
    backend = choose_backend(CPU, FLOAT)
    assert isinstance(backend, PlainBackend)
    said = what_is_missing(backend, "auto")
    assert said is not None
    assert "they weren't compiled" in said
    assert choose.COST in said


def test_a_level_that_this_machine_has_not_is_refused() -> None:
    lacking = next(level.name for level in LEVELS if level.name not in RUNS)
    with pytest.raises(KernelsRefused, match=f"^{lacking}: "):
        choose_backend(CPU, FLOAT, lacking)


def test_a_level_on_a_gpu_is_refused() -> None:
    with pytest.raises(KernelsRefused, match="avx2: these kernels are the CPU's, and the model runs on cuda"):
        choose_backend(torch.device("cuda"), FLOAT, "avx2")


@native
def test_a_level_that_computes_something_else_is_passed_over_or_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = CpuBackend.collect

    def wrong(backend: CpuBackend, launched: CpuStep, wake: int = -1) -> StepOutput:
        output = real(backend, launched, wake)
        return replace(output, logits=output.logits * 1.1) if RUNS[0] in backend.description else output

    monkeypatch.setattr(CpuBackend, "collect", wrong)
    choose._wrong.cache_clear()
    try:
        chosen = choose_backend(CPU, FLOAT).description
        assert f"native {RUNS[1]}" in chosen if len(RUNS) > 1 else "native" not in chosen
        assert f"{RUNS[0]} are passed over: its logits are 0." in caplog.text
        with pytest.raises(KernelsRefused, match=f"{RUNS[0]}: its logits are"):
            choose_backend(CPU, FLOAT, RUNS[0])
    finally:
        choose._wrong.cache_clear()


@native
def test_both_kinds_of_activations_are_held_to_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = CpuBackend.collect

    def wrong(backend: CpuBackend, launched: CpuStep, wake: int = -1) -> StepOutput:
        output = real(backend, launched, wake)
        off = 1.03 if backend.activations == "bfloat16" else 1.0
        return replace(output, logits=output.logits * off)

    monkeypatch.setattr(CpuBackend, "collect", wrong)
    choose._wrong.cache_clear()
    try:
        assert isinstance(choose_backend(CPU, FLOAT), CpuBackend)
        assert isinstance(choose_backend(CPU, FLOAT, activations="bfloat16"), PlainBackend)
        assert "of which 0.02 are allowed" in caplog.text
    finally:
        choose._wrong.cache_clear()


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@native
def test_torch_leaves_the_cores_to_native_threads_only(torch_threads: None) -> None:
    leave_cores_to(choose_backend(CPU, FLOAT, "plain"))
    assert torch.get_num_threads() == 2
    leave_cores_to(choose_backend(CPU, FLOAT))
    assert torch.get_num_threads() == 1

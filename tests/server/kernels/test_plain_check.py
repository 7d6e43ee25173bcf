"""What a GPU is asked at load: what it computes wrongly or refuses isn't used, and is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F

from manylora.server.kernels import choose
from manylora.server.kernels.choose import choose_backend
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.plain.cuda_graph import CudaRecorder
from manylora.server.kernels.plain_check import sound_plain
from tests.server.model.models import save_model
from tests.server.model.steps import CPU, Stream, all_logits, load, step

Call = Callable[[], None]


class Recorder:
    """Plays back what ``play`` makes of a call."""

    def __init__(self, play: Callable[[Call], Call]) -> None:
        self._play = play
        self.recorded = 0

    def __call__(self, call: Call) -> Call:
        self.recorded += 1
        return self._play(call)


def as_it_was(call: Call) -> Call:
    return call


def nothing(call: Call) -> Call:
    return lambda: None


def refuse(call: Call) -> NoReturn:
    raise RuntimeError("operation not permitted when stream is capturing")


def of_another_torch(call: Call) -> NoReturn:
    raise TypeError("capture_begin() got an unexpected keyword argument")


def refuse_to_play(call: Call) -> Call:
    def again() -> None:
        raise RuntimeError("out of memory")

    return again


def decoded(directory: Path, backend: PlainBackend) -> torch.Tensor:
    """Return the logits of a prompt and six decode steps."""
    model = load(directory, backend.dtype, backend=backend)
    stream = Stream(0, list(range(3, 12)), ())
    step(model, [(stream, 3)])
    for _ in range(6):
        step(model, [(stream, 1)])
    return all_logits(stream)


def test_what_is_sound_is_used_and_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("qwen2", tmp_path)
    recorder = Recorder(as_it_was)
    backend = sound_plain(CPU, torch.bfloat16, None, recorder)
    tried = recorder.recorded
    assert tried > 0
    fused = []
    real = F.scaled_dot_product_attention

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        fused.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    decoded(tmp_path, backend)
    assert recorder.recorded == tried + 1
    assert fused
    assert not caplog.records


@pytest.mark.parametrize(
    ("play", "said"),
    [
        (nothing, "recorded ones give other logits"),
        (refuse, "they can't be recorded: operation not permitted when stream is capturing"),
        (of_another_torch, "they can't be recorded: capture_begin() got an unexpected keyword argument"),
        (refuse_to_play, "they can't be recorded: out of memory"),
    ],
)
def test_recordings_that_are_wrong_or_refused_are_given_up(
    play: Callable[[Call], Call], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model("qwen2", tmp_path)
    recorder = Recorder(play)
    backend = sound_plain(CPU, torch.float32, None, recorder)
    assert [record.getMessage() for record in caplog.records] == [
        f"decode steps are issued op by op on cpu: {said}"
    ]
    tried = recorder.recorded
    assert torch.equal(decoded(tmp_path, backend), decoded(tmp_path, PlainBackend(CPU, torch.float32)))
    assert recorder.recorded == tried


def test_a_recording_that_reads_what_an_adapter_was_is_found(caplog: pytest.LogCaptureFixture) -> None:
    """The first playing of each is right: only what changes after it shows."""

    def once(call: Call) -> Call:
        played: list[int] = []

        def again() -> None:
            played.append(0)
            if len(played) < 2:
                call()

        return again

    sound_plain(CPU, torch.float32, None, once)
    assert "recorded ones give other logits" in caplog.text


def norm_off(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * weight


def no_kernel(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("no kernel image is available")


def not_a_number(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.nan


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("rms_norm", norm_off, "of which 0.03 are allowed"),
        ("rms_norm", not_a_number, "sound numbers are told to be none"),
        ("scaled_dot_product_attention", no_kernel, "RuntimeError: no kernel image is available"),
    ],
)
def test_torchs_own_kernels_are_given_up_where_they_are_off_or_refused(
    name: str,
    wrong: Callable[..., torch.Tensor],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_model("qwen2", tmp_path)
    monkeypatch.setattr(F, name, wrong)
    backend = sound_plain(CPU, torch.bfloat16, None, Recorder(as_it_was))
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "torch's own kernels for RMSNorm and attention aren't used on cpu: "
    )
    assert said in record.getMessage()
    assert torch.equal(decoded(tmp_path, backend), decoded(tmp_path, PlainBackend(CPU, torch.bfloat16)))


def test_a_gpu_is_asked_and_records_unless_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.device, torch.dtype, torch.dtype | None, object]] = []

    def noted(
        device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None, record: object
    ) -> PlainBackend:
        asked.append((device, dtype, kv_dtype, record))
        return PlainBackend(CPU, dtype)

    monkeypatch.setattr(choose, "sound_plain", noted)
    gpu = torch.device("cuda")
    choose_backend(gpu, torch.bfloat16)
    choose_backend(gpu, torch.float16, kv_dtype=torch.int8, cuda_graphs=False)
    choose_backend(CPU, torch.float32, "plain")
    assert [each[:3] for each in asked] == [
        (gpu, torch.bfloat16, None),
        (gpu, torch.float16, torch.int8),
    ]
    assert isinstance(asked[0][3], CudaRecorder)
    assert asked[1][3] is None

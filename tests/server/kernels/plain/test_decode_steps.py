"""Steps that only decode, in fixed shapes: what comes out is what the same ops give unpadded, to the bit.

Where there is no GPU, playing a recording back is calling what was recorded: what is held here is what is copied to
where, what is padded, and when something new has to be recorded.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from manylora.server.kernels.plain import PlainBackend, decode_steps
from manylora.server.kernels.plain.backend import fused_rms_norm
from manylora.server.kernels.plain.invariance import MATMUL_LIMITS, UNLIMITED
from manylora.server.kernels.plain.lora_table import lay_out_table
from manylora.server.kernels.step import (
    AttentionMetadata,
    RankRange,
    StepAdapters,
    StepBatch,
    WeightedAdapters,
)
from manylora.server.model.served import ServedModel
from tests.server.model.models import save_model
from tests.server.model.steps import CPU, Stream, all_logits, load, place, random_adapter, step


class Recorder:
    """Records nothing and calls again what it was given."""

    def __init__(self) -> None:
        self.recorded = 0
        self.played = 0

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def again() -> None:
            self.played += 1
            call()

        return again


def refuse(call: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("out of memory")


def run(
    model: ServedModel, prompts: Sequence[int], decodes: int, uses: Sequence[WeightedAdapters]
) -> list[Stream]:
    """Bring in prompts of these lengths, then decode them all, the last stream every other step."""
    streams = [
        Stream(number, [(7 * number + 3 * i) % 300 for i in range(length + decodes)], used)
        for number, (length, used) in enumerate(zip(prompts, uses, strict=True))
    ]
    step(model, list(zip(streams, prompts, strict=True)))
    for turn in range(decodes):
        step(model, [(stream, 1) for stream in streams[: len(streams) - turn % 2]])
    return streams


def same(scratch: Path, backends: Sequence[PlainBackend], rows: int, mixtures: bool = True) -> None:
    found = []
    for backend in backends:
        model = load(scratch, backend.dtype, rows=rows, backend=backend)
        config = model.decoder.config
        one, two, three = place(
            model,
            [
                random_adapter(config, 8, 1, outputs=True),
                random_adapter(config, 4, 2, ("q_proj", "v_proj", "down_proj")),
                random_adapter(config, 16, 3, ("k_proj", "gate_proj", "up_proj", "o_proj"), outputs=True),
            ],
            first_row=6,
        )
        mixed: WeightedAdapters = ((one, 0.5), (three, 0.25)) if mixtures else ((three, 1.0),)
        uses = [((one, 1.0),), (), ((two, 1.0),), mixed, ((one, 1.0),)]
        found.append([all_logits(stream) for stream in run(model, (3, 61, 130, 1, 20), 8, uses)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["qwen2-window", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [64, 512])
def test_fixed_shapes_give_the_same_bits(name: str, dtype: torch.dtype, rows: int, tmp_path: Path) -> None:
    """An arena of 64 rows is multiplied as it is; of one of 512 the rows in use are gathered."""
    save_model(name, tmp_path)
    recorder = Recorder()
    fixed = PlainBackend(CPU, dtype, record=recorder, fixed_decodes=True)
    same(tmp_path, [PlainBackend(CPU, dtype), fixed], rows)
    # Contexts fill 192 tokens; five rows and four are eight and four, or sixteen, the fewest that float32 may have.
    assert (recorder.recorded, recorder.played) == ((1, 7) if dtype is torch.float32 else (2, 6))


def test_keys_in_8_bits_too(tmp_path: Path) -> None:
    save_model("llama3", tmp_path)
    backends = [PlainBackend(CPU, torch.float32, torch.int8, fixed_decodes=fixed) for fixed in (False, True)]
    same(tmp_path, backends, 512, mixtures=False)


def test_what_cannot_be_recorded_is_computed_op_by_op(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model("qwen2", tmp_path)
    fixed = PlainBackend(CPU, torch.float32, record=refuse, fixed_decodes=True)
    same(tmp_path, [PlainBackend(CPU, torch.float32), fixed], 512)
    assert [record.getMessage() for record in caplog.records] == [
        "decode steps are issued op by op from now on: they can't be recorded: out of memory"
    ]


def test_what_cannot_be_played_back_is_computed_op_by_op(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what was recorded before: its playing is refused as well."""
    save_model("qwen2", tmp_path)
    played = []

    def record(call: Callable[[], None]) -> Callable[[], None]:
        def again() -> None:
            played.append(call)
            if len(played) > 2:
                raise RuntimeError("out of memory")
            call()

        return again

    fixed = PlainBackend(CPU, torch.float32, record=record, fixed_decodes=True)
    same(tmp_path, [PlainBackend(CPU, torch.float32), fixed], 512)
    assert [record.getMessage() for record in caplog.records] == [
        "decode steps are issued op by op from now on: one can't be played back: out of memory"
    ]
    assert len(played) == 3


def test_rows_are_not_padded_to_one_long_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless that is little: below so many keys a GPU takes as long to be told as to compute."""
    save_model("qwen2", tmp_path)

    def recorded(*prompts: int) -> int:
        recorder = Recorder()
        model = load(tmp_path, backend=PlainBackend(CPU, torch.bfloat16, record=recorder, fixed_decodes=True))
        run(model, prompts, 1, [()] * len(prompts))
        return recorder.recorded

    assert recorded(150, 1, 1, 1) == 1
    monkeypatch.setattr(decode_steps, "FEW_KEYS", 0)
    assert recorded(150, 1, 1, 1) == 0
    assert recorded(150, 150, 150, 150) == 1


def test_a_fused_norm_hides_no_row_whose_squares_overflow_only_in_their_sum(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    model = load(tmp_path, backend=PlainBackend(CPU, torch.float32, fused=True))
    backend, weights = model.decoder.backend, model.decoder.weights
    attention = AttentionMetadata.of_rows([0, 0, 0], [1, 1, 1], [[1], [2], [3]], model.kv.block_size)
    every = np.arange(3, dtype=np.int32)
    plan = backend.begin_step(
        weights, StepBatch(every, attention, StepAdapters.of_rows([(), (), ()]), every), model.kv, model.arena
    )
    x = torch.ones(3, weights.final_norm.shape[0])
    x[1] = 1.5e19
    assert bool(x[1].square().isfinite().all())
    assert not bool(fused_rms_norm(x, weights.final_norm, weights.eps)[1].any())
    assert backend.finite(plan, x).tolist() == [True, False, True]


def test_other_adapters_are_no_other_work(tmp_path: Path) -> None:
    """The same recording serves whatever adapters ride in it; another number of modules or columns is another one."""
    save_model("qwen2", tmp_path)
    recorder = Recorder()
    model = load(tmp_path, backend=PlainBackend(CPU, torch.float32, record=recorder, fixed_decodes=True))
    config = model.decoder.config
    adapters = place(model, [random_adapter(config, 8, seed) for seed in range(8)])
    narrow = place(model, [random_adapter(config, 4, 9, ("q_proj",))], first_row=300)

    def decode(number: int, *uses: WeightedAdapters) -> int:
        before = recorder.recorded
        run(model, [5] * len(uses), 1, uses)
        return recorder.recorded - before

    assert decode(0, ((adapters[0], 1.0),), ((adapters[1], 1.0),)) == 1
    assert decode(1, ((adapters[4], 1.0),), ((adapters[1], 1.0),)) == 0
    assert decode(2, (), ((adapters[7], 1.0),)) == 0, "16 columns hold one adapter of rank 8 as well"
    assert decode(3, ((adapters[2], 0.5),), ((adapters[1], 1.0),)) == 1, "weights"
    assert decode(4, (), ()) == 1, "no adapters"
    assert decode(5, ((narrow[0], 1.0),), ()) == 1, "one module"
    assert decode(6, ((adapters[0], 1.0),), ((adapters[1], 1.0),)) == 0


def test_another_arena_is_another_model(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    backend = PlainBackend(CPU, torch.float32, record=Recorder(), fixed_decodes=True)
    plain = PlainBackend(CPU, torch.float32)
    first, second = (load(tmp_path, backend=backend) for _ in range(2))
    other = load(tmp_path, backend=plain)
    logits = []
    for model, seed in ((first, 1), (second, 2), (other, 2)):
        (ranges,) = place(model, [random_adapter(model.decoder.config, 8, seed)])
        logits.append([all_logits(each) for each in run(model, (9, 4), 3, [((ranges, 1.0),)] * 2)])
    assert all(torch.equal(a, b) for a, b in zip(logits[1], logits[2], strict=True))
    assert not torch.equal(logits[0][0], logits[1][0])


def test_a_row_that_overflows_is_told_and_its_neighbour_is_not(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    model = load(tmp_path, backend=PlainBackend(CPU, torch.float32, record=Recorder(), fixed_decodes=True))
    good, bad = place(
        model,
        [random_adapter(model.decoder.config, 8, 1), random_adapter(model.decoder.config, 8, 2, scale=1e30)],
    )
    streams = [Stream(n, list(range(9)), used) for n, used in enumerate([((good, 1.0),), ((bad, 1.0),), ()])]
    for _ in range(4):
        step(model, [(stream, 1) for stream in streams])
    assert [stream.finite[-1] for stream in streams] == [True, False, True]


def test_adapters_that_change_places_are_told_to_what_was_recorded(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    recorder = Recorder()
    found = []
    for backend in (
        PlainBackend(CPU, torch.float32),
        PlainBackend(CPU, torch.float32, record=recorder, fixed_decodes=True),
    ):
        model = load(tmp_path, backend=backend)
        one, two = place(model, [random_adapter(model.decoder.config, 8, seed) for seed in (1, 2)])
        logits = []
        for uses in ((one, two), (two, one), (two, two)):
            streams = [Stream(n, list(range(n, n + 6)), ((used, 1.0),)) for n, used in enumerate(uses)]
            for _ in range(3):
                step(model, [(stream, 1) for stream in streams])
            logits += [all_logits(stream) for stream in streams]
        found.append(logits)
    assert recorder.recorded == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_table_keeps_to_the_order_and_the_groups_in_which_terms_are_added() -> None:
    limits = MATMUL_LIMITS[torch.bfloat16]
    odd, even = ({"q_proj": RankRange(start, 3)} for start in (301, 320))
    table = lay_out_table(StepAdapters.of_rows([((odd, 1.0),), ((even, 1.0),)]), 512, limits)
    assert table is not None
    assert table.rows[0, : 4 + 3].tolist() == [301, 302, 303, 0, 320, 321, 322]
    falling = StepAdapters.of_rows([((even, 1.0), (odd, 1.0))])
    assert lay_out_table(falling, 512, limits) is None
    assert lay_out_table(falling, 512, UNLIMITED) is not None

"""The native backend as a whole: near the plain one, the same to the bit whoever shares a step, and felt by nobody."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights, LoraPair
from manylora.server.kernels.backend import compose
from manylora.server.kernels.cpu.backend import Activations, CpuBackend
from manylora.server.kernels.cpu.library import Kernels, open_kernels
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.step import AdapterRanges, AttentionMetadata, RankRange, StepAdapters, StepBatch
from manylora.server.model.loader import Quantization
from manylora.server.model.served import ServedModel
from tests.server.kernels.cpu.conftest import RUNS
from tests.server.model.models import FAMILIES, save_model
from tests.server.model.steps import BLOCK, CPU, Stream, all_logits, ints, load, place, random_adapter, step
from tests.server.model.test_devices import FORMATS, save

IDS = list(range(3, 203))
RANKS = (8, 3, 16)
SCALING = (3, 16)
"""Ranks of those that scale and shift outputs too."""
NEAR = 0.05
"""Of logits of noise, relative: an activation is off by up to 1/255 of its group's range, in every matrix."""
FINER = 0.02
"""The same with activations of bfloat16: embedding and head are of 8 bits in both, keys and values of bfloat16."""
Moves = Sequence[tuple[int, int]]
"""(number of a stream, tokens) pairs of one step."""


def native(
    directory: Path,
    kernels: Kernels,
    quantization: Quantization = "auto",
    rows: int = 512,
    activations: Activations = "int8",
    kv_dtype: torch.dtype = torch.bfloat16,
) -> ServedModel:
    backend = CpuBackend(kernels, torch.float32, activations, kv_dtype)
    return load(directory, quantization=quantization, rows=rows, backend=backend)


def uses(model: ServedModel, first_row: int = 5) -> list[tuple[tuple[AdapterRanges, float], ...]]:
    """Base, single adapters and mixtures."""
    config = model.decoder.config
    adapters = [random_adapter(config, rank, rank, outputs=rank in SCALING) for rank in RANKS]
    adapters.append(random_adapter(config, 4, 9, ("q_proj", "down_proj"), outputs=True))
    one, two, three, few = place(model, adapters, first_row)
    return [(), ((one, 1.0),), ((two, 0.5), (three, -0.7)), ((few, 1.0), (one, 0.3)), ((three, 1.0),)]


def answers(model: ServedModel, moves: Sequence[Moves], first_row: int = 5) -> list[Tensor]:
    streams = [Stream(n, IDS[n:], adapters) for n, adapters in enumerate(uses(model, first_row))]
    for work in moves:
        step(model, [(streams[number], count) for number, count in work])
    return [all_logits(stream) for stream in streams]


ALL = range(5)
WHOLE = [[(n, 90) for n in ALL]]
APART = [[(n, 90)] for n in ALL]
CHUNKS = [
    [(0, 1), (3, 64), (1, 30)],
    [(4, 90), (0, 1)],
    [(1, 60), (2, 89), (0, 86), (3, 1)],
    *[[(0, 1), (2, 1)]],
    *[[(0, 1), (3, 1)]] * 1,
    [(3, 24)],
]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_answers_as_plain_torch_does(name: str, kernels: Kernels, tmp_path: Path) -> None:
    """On the same 8-bit weights."""
    save_model(name, tmp_path)
    plain = answers(load(tmp_path, quantization="int8"), WHOLE)
    for ours, theirs in zip(answers(native(tmp_path, kernels, "int8"), WHOLE), plain, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < NEAR


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_keys_and_values_in_8_bits_answer_as_plain_torchs_do(
    name: str, kernels: Kernels, tmp_path: Path
) -> None:
    save_model(name, tmp_path)
    plain = PlainBackend(CPU, torch.float32, torch.int8)
    theirs = answers(load(tmp_path, quantization="int8", backend=plain), WHOLE)
    ours = answers(native(tmp_path, kernels, "int8", kv_dtype=torch.int8), WHOLE)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() / other.norm() < NEAR


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_answers_as_plain_torch_does(name: str, kernels: Kernels, tmp_path: Path) -> None:
    save(name, tmp_path)
    quantization: Quantization = "none" if name == "dense" else "auto"
    plain = answers(load(tmp_path, quantization=quantization), WHOLE)
    for ours, theirs in zip(answers(native(tmp_path, kernels, quantization), WHOLE), plain, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < NEAR


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "dense"])
def test_activations_of_bfloat16_are_nearer_to_plain_torch(
    name: str, kernels: Kernels, tmp_path: Path
) -> None:
    save(name, tmp_path)
    plain, coarse, fine = (
        torch.cat(answers(model, WHOLE))
        for model in (
            load(tmp_path, quantization="auto"),
            native(tmp_path, kernels),
            native(tmp_path, kernels, activations="bfloat16"),
        )
    )
    off = (fine - plain).norm() / plain.norm()
    assert off < FINER
    assert off < 0.8 * (coarse - plain).norm() / plain.norm()


FLOAT, BYTE = torch.bfloat16, torch.int8


@pytest.mark.parametrize(
    ("quantization", "activations", "kv_dtype"),
    [
        ("nf4", "int8", FLOAT),
        ("int8", "int8", BYTE),
        ("none", "int8", FLOAT),
        ("nf4", "bfloat16", BYTE),
        ("int8", "bfloat16", FLOAT),
    ],
)
def test_a_tokens_bits_are_its_own(
    quantization: Quantization,
    activations: Activations,
    kv_dtype: torch.dtype,
    kernels: Kernels,
    tmp_path: Path,
) -> None:
    """Whoever shares its steps, however its prompt is chunked, wherever its adapters lie."""
    save_model("qwen2-window", tmp_path)
    whole = answers(native(tmp_path, kernels, quantization, 512, activations, kv_dtype), WHOLE)
    for moves, first_row in ((APART, 5), (CHUNKS, 5), (WHOLE, 40)):
        other = answers(native(tmp_path, kernels, quantization, 512, activations, kv_dtype), moves, first_row)
        assert all(map(torch.equal, other, whole))


@pytest.mark.skipif(not RUNS, reason="no native kernels")
def test_bits_do_not_depend_on_how_many_threads_there_are(tmp_path: Path) -> None:
    save_model("qwen3", tmp_path)
    found = []
    for threads in (1, 2, 3):
        kernels = open_kernels(threads=threads)
        assert isinstance(kernels, Kernels)
        found.append(answers(native(tmp_path, kernels), CHUNKS))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_ops_one_by_one_give_what_one_call_does(kernels: Kernels, tmp_path: Path) -> None:
    save_model("qwen2-window", tmp_path)
    model = native(tmp_path, kernels)
    composed = native(tmp_path, kernels)
    backend = composed.decoder.backend
    layers = composed.decoder.config.num_layers
    backend.forward = lambda plan: compose(backend, plan, layers)  # type: ignore[method-assign]
    assert all(map(torch.equal, answers(composed, CHUNKS), answers(model, CHUNKS)))


def test_another_adapter_that_overflows_is_not_felt(kernels: Kernels, tmp_path: Path) -> None:
    """Its factors are infinite, and the rows beside one's own hold them."""
    save_model("qwen2", tmp_path)
    sound = answers(native(tmp_path, kernels), WHOLE)
    model = native(tmp_path, kernels)
    streams = [Stream(n, IDS[n:], adapters) for n, adapters in enumerate(uses(model))]
    spoiled = spoil(model, streams)
    bad = Stream(9, IDS, ((spoiled, 1.0),))
    step(model, [(streams[0], 90), (bad, 20), *[(stream, 90) for stream in streams[1:]]])
    assert not any(bad.finite)
    for stream, expected in zip(streams, sound, strict=True):
        assert torch.equal(all_logits(stream), expected)
        assert all(stream.finite)


def spoil(model: ServedModel, streams: Sequence[Stream]) -> AdapterRanges:
    """Fill every row of the arena that no stream uses with infinity; return ranges of such rows."""
    config = model.decoder.config
    owned = {
        (module, row)
        for stream in streams
        for ranges, _ in stream.adapters
        for module, own in ranges.items()
        for row in range(own.start, own.start + own.rank)
    }
    infinite = AdapterWeights(
        {
            path: LoraPair(torch.full((1, wide), torch.inf), torch.full((1, out), torch.inf))
            for path, (out, wide) in config.base_modules().items()
        }
    )
    for module in config.module_shapes():
        for row in range(model.arena.rows):
            if (module, row) not in owned:
                model.arena.write({module: RankRange(row, 1)}, infinite)
    return {module: RankRange(model.arena.rows - 4, 4) for module in config.module_shapes()}


@pytest.mark.parametrize("outputs", [False, True])
def test_moved_adapters_answer_alike(kernels: Kernels, tmp_path: Path, *, outputs: bool) -> None:
    save_model("qwen2", tmp_path)
    model = native(tmp_path, kernels)
    [ranges] = place(model, [random_adapter(model.decoder.config, 8, 1, outputs=outputs)])
    before = Stream(0, IDS, ((ranges, 1.0),))
    step(model, [(before, 40)])
    for module, own in ranges.items():
        # Onto itself, in part.
        model.arena.move(module, own, own.start + 3)
    moved = {module: RankRange(own.start + 3, own.rank) for module, own in ranges.items()}
    after = Stream(1, IDS, ((moved, 1.0),))
    step(model, [(after, 40)])
    assert torch.equal(all_logits(before), all_logits(after))


def test_a_part_that_an_adapter_does_not_have_is_cleared(kernels: Kernels, tmp_path: Path) -> None:
    """Ranks differ by layer and rows are used again: what lay there adds nothing."""
    save_model("qwen2", tmp_path)
    fresh, used = native(tmp_path, kernels), native(tmp_path, kernels)
    config = fresh.decoder.config
    place(used, [random_adapter(config, 32, 7)])
    pairs = dict(random_adapter(config, 8, 1).pairs)
    short = next(iter(pairs))
    pairs[short] = LoraPair(pairs[short].a[:3], pairs[short].b[:3])
    del pairs[next(path for path in pairs if path != short and path.endswith("q_proj"))]
    found = []
    for model in (fresh, used):
        [ranges] = place(model, [AdapterWeights(pairs)])
        stream = Stream(0, IDS, ((ranges, 1.0),))
        step(model, [(stream, 30)])
        found.append(all_logits(stream))
    assert torch.equal(*found)


def test_a_step_of_rows_without_tokens(kernels: Kernels, tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    model = native(tmp_path, kernels)
    alone, beside = Stream(0, IDS, uses(model)[1]), Stream(1, IDS, uses(model)[1])
    step(model, [(alone, 10)])
    idle = Stream(2, IDS, uses(model)[2])
    step(model, [(idle, 0), (beside, 10), (idle, 0)])
    assert torch.equal(all_logits(alone), all_logits(beside))


def test_what_another_backend_made_is_refused(kernels: Kernels, tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    plain = load(tmp_path)
    backend = CpuBackend(kernels, torch.bfloat16)
    with pytest.raises(TypeError, match="made by another backend"):
        backend.assemble(plain.decoder.weights)
    ours = native(tmp_path, kernels)
    nothing = ints([])
    attention = AttentionMetadata(nothing, nothing, ints([0]), nothing, nothing)
    batch = StepBatch(nothing, attention, StepAdapters.of_rows([]), nothing)
    model = backend.assemble(ours.decoder.weights)
    for kv, arena in ((plain.kv, ours.arena), (ours.kv, plain.arena)):
        with pytest.raises(TypeError, match="made by another backend"):
            backend.begin_step(model, batch, kv, arena)


def test_a_batch_that_is_kept_is_computed_as_it_is_now(kernels: Kernels, tmp_path: Path) -> None:
    """What was laid out for a step is kept for the next with the same objects; their arrays have changed meanwhile."""
    save_model("qwen2", tmp_path)
    model = native(tmp_path, kernels)
    used = uses(model)[:3]

    def of(starts: list[int], ids: list[int]) -> StepBatch:
        tables = [Stream(number, []).table for number in range(3)]
        attention = AttentionMetadata.of_rows(starts, [1] * 3, tables, BLOCK)
        return StepBatch(ints(ids), attention, StepAdapters.of_rows(used), ints([0, 1, 2]))

    kept = of([0, 0, 0], [3, 4, 5])
    model(kept)
    for position in (1, 2):
        fresh = of([position] * 3, [7 * position, 8, 9])
        right = model(fresh).logits
        kept.token_ids[:] = fresh.token_ids
        for name in ("positions", "slots", "context_lens"):
            getattr(kept.attention, name)[:] = getattr(fresh.attention, name)
        for _ in range(2):
            assert torch.equal(model(kept).logits, right)


def test_what_was_not_finite_in_a_kept_batch_is_forgotten(kernels: Kernels, tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    model = native(tmp_path, kernels)
    streams = [Stream(0, IDS), Stream(1, IDS)]
    batch = StepBatch(
        ints([3, 3]),
        AttentionMetadata.of_rows([0, 0], [1, 1], [stream.table for stream in streams], BLOCK),
        StepAdapters.of_rows([((spoil(model, streams), 1.0),), ()]),
        ints([0, 1]),
    )
    assert model(batch).finite.tolist() == [False, True]
    assert model(batch).finite.tolist() == [False, True]
    plan = model.decoder.backend.begin_step(model.decoder._model, batch, model.kv, model.arena)
    assert plan.finite.all()

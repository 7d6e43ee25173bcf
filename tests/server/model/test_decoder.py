"""The decoder against transformers, peft and bitsandbytes on small random models of every family."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights
from manylora.server.kernels.step import AttentionMetadata, StepAdapters, StepBatch
from manylora.server.model.loader import Quantization
from manylora.server.model.served import ServedModel
from tests.server.model.models import FAMILIES, save_model
from tests.server.model.peft_models import adapted, nf4_model
from tests.server.model.steps import Stream, all_logits, ints, load, place, random_adapter, step

TOLERANCE = 1e-4
LENGTHS = (1, 2, 17, 64, 65, 100, 130)


def tokens(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids: list[int] = torch.randint(0, 320, (length,), generator=generator).tolist()
    return ids


@torch.no_grad()
def reference(model: torch.nn.Module, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Prompts of many lengths in one mixed step, then one more token each in another."""
    theirs, model = save_model(family, tmp_path), load(tmp_path)
    streams = [Stream(number, tokens(length + 1)) for number, length in enumerate(LENGTHS)]
    step(model, [(stream, len(stream.tokens) - 1) for stream in streams])
    step(model, [(stream, 1) for stream in streams])
    for stream in streams:
        assert difference(all_logits(stream), reference(theirs, stream.tokens)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_chunks_nor_company_change_a_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    model = load(tmp_path, dtype)
    whole, chunked, decoded = (Stream(number, tokens(70)) for number in range(3))
    others = [Stream(number, tokens(40, number)) for number in range(3, 9)]
    step(model, [(whole, 70)])
    for count in (1, 30, 2, 37):
        step(model, [(others[0], 5), (chunked, count), *[(other, 1) for other in others[1:]]])
    for _ in range(70):
        step(model, [(decoded, 1)])
    assert torch.equal(all_logits(whole), all_logits(chunked))
    assert torch.equal(all_logits(whole), all_logits(decoded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_keeps_bits_in_company(dtype: torch.dtype, double_quant: bool, tmp_path: Path) -> None:
    """With adapters, in 4 bits: alone, and among others' prompts and decodes."""
    save_model("qwen2", tmp_path)
    model = load(tmp_path, dtype, quantization="nf4", double_quant=double_quant)
    config = model.decoder.config
    mixed, alone = mixed_and_alone(
        model, [random_adapter(config, rank, rank, outputs=rank == 16) for rank in (4, 16, 64)]
    )
    for ours, single in zip(mixed, alone, strict=True):
        assert torch.equal(all_logits(ours), all_logits(single))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_are_near_those_of_transformers(family: str, tmp_path: Path) -> None:
    """As near as its own bfloat16 logits are to its float32 ones, which rounding decides."""
    theirs, model = save_model(family, tmp_path, torch.bfloat16), load(tmp_path, torch.bfloat16)
    stream = Stream(0, tokens(100))
    step(model, [(stream, 60)])
    step(model, [(stream, 40)])
    exact = reference(theirs.float(), stream.tokens)
    rounded = reference(theirs.to(torch.bfloat16), stream.tokens)
    assert difference(all_logits(stream), exact) <= 1.5 * difference(rounded, exact)
    agreed = all_logits(stream).argmax(-1) == exact.argmax(-1)
    assert float(agreed.float().mean()) >= 0.9


def test_metadata_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    model = load(tmp_path)
    fits = AttentionMetadata(ints(range(3)), ints(range(3)), ints([0, 3]), ints([3]), ints([[0]]))
    wrong: dict[str, dict[str, object]] = {
        "positions and slots": {"positions": ints([0, 1])},
        "query_start": {"query_start": ints([0, 2])},
        "contexts": {"context_lens": ints([3, 3])},
        "block tables": {"block_tables": ints([[0], [0]])},
        "its table has 1 blocks": {"context_lens": ints([17])},
        "the model has 512": {"context_lens": ints([513])},
        "more tokens than its context": {"context_lens": ints([2])},
    }
    for named, fields in wrong.items():
        attention = dataclasses.replace(fits, **fields)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=named):
            model(StepBatch(ints([0] * 3), attention, StepAdapters.of_rows([()]), ints([0])))


def mixed_and_alone(model: ServedModel, adapters: list[AdapterWeights]) -> tuple[list[Stream], list[Stream]]:
    """Run base and adapters alone, then all interleaved: prompts in chunks beside decodes."""
    placed = place(model, adapters)
    uses = [(), *[((ranges, 1.0),) for ranges in placed]]

    def streams() -> list[Stream]:
        return [Stream(number, tokens(33), adapters) for number, adapters in enumerate(uses)]

    alone, mixed = streams(), streams()
    for stream in alone:
        step(model, [(stream, 33)])
    # The others' prompts run while the first ones decode already.
    for turn in range(33 + len(mixed)):
        work = [(stream, 1) for n, stream in enumerate(mixed) if n <= turn and stream.computed < 33]
        if work:
            step(model, work)
    return mixed, alone


@pytest.mark.parametrize("family", ["qwen2", "llama3", "mistral", "qwen3"])
def test_a_mixed_batch_equals_separate_runs_and_peft(family: str, tmp_path: Path) -> None:
    theirs, model = save_model(family, tmp_path), load(tmp_path)
    config = model.decoder.config
    targets = (None, ("q_proj", "v_proj"), ("o_proj", "down_proj"), ("gate_proj", "up_proj", "k_proj"))
    ranks = (4, 8, 16, 64)
    adapters = [
        random_adapter(config, rank, seed, modules)
        for seed, (rank, modules) in enumerate(zip(ranks, targets, strict=True))
    ]
    mixed, alone = mixed_and_alone(model, adapters)
    for first in range(len(alone)):
        for second in range(first):
            assert difference(all_logits(alone[first]), all_logits(alone[second])) > 0.01
    for ours, single in zip(mixed, alone, strict=True):
        assert torch.equal(all_logits(ours), all_logits(single))
    assert difference(all_logits(mixed[0]), reference(theirs, mixed[0].tokens)) <= TOLERANCE
    for stream, weights in zip(mixed[1:], adapters, strict=True):
        assert difference(all_logits(stream), reference(adapted(theirs, weights), stream.tokens)) <= TOLERANCE


def test_a_mixture_is_the_weighted_sum_of_its_adapters(tmp_path: Path) -> None:
    theirs, model = save_model("qwen2", tmp_path), load(tmp_path)
    one, two = (random_adapter(model.decoder.config, rank, rank) for rank in (4, 16))
    placed = place(model, [one, two])
    mixture = Stream(0, tokens(40), ((placed[0], 0.7), (placed[1], -0.4)))
    step(model, [(mixture, 40)])
    expected = reference(adapted(adapted(theirs, one, 0.7), two, -0.4), mixture.tokens)
    assert difference(all_logits(mixture), expected) <= TOLERANCE


def test_long_prompts_of_many_large_adapters(tmp_path: Path) -> None:
    """Past 256 rows adapters take turns instead of sharing one masked product."""
    theirs, model = save_model("llama2", tmp_path), load(tmp_path)
    adapters = [random_adapter(model.decoder.config, 64, seed) for seed in range(6)]
    streams = [
        Stream(number, tokens(30, number), ((ranges, 1.0),))
        for number, ranges in enumerate(place(model, adapters))
    ]
    step(model, [(stream, 30) for stream in streams])
    for stream, weights in zip(streams, adapters, strict=True):
        assert difference(all_logits(stream), reference(adapted(theirs, weights), stream.tokens)) <= TOLERANCE


def test_rows_can_move(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    model = load(tmp_path)
    (ranges,) = place(model, [random_adapter(model.decoder.config, 8, 1)], first_row=40)
    before, after = (Stream(number, tokens(20), ((ranges, 1.0),)) for number in range(2))
    step(model, [(before, 20)])
    moved = {}
    for module, owned in ranges.items():
        model.arena.move(module, owned, 36)  # onto its own first rows
        moved[module] = type(owned)(36, owned.rank)
    after.adapters = ((moved, 1.0),)
    step(model, [(after, 20)])
    assert torch.equal(all_logits(before), all_logits(after))


@pytest.mark.parametrize("family", ["qwen2", "llama2"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_logits_are_those_of_transformers_with_bitsandbytes(
    family: str, double_quant: bool, tmp_path: Path
) -> None:
    save_model(family, tmp_path / "base")
    theirs = nf4_model(tmp_path / "base", double_quant=double_quant)
    theirs.save_pretrained(tmp_path / "quantised")
    ways: tuple[tuple[Path, Quantization], ...] = (
        (tmp_path / "base", "nf4"),
        (tmp_path / "quantised", "auto"),
    )
    for directory, quantization in ways:
        model = load(directory, quantization=quantization, double_quant=double_quant)
        stream = Stream(0, tokens(50))
        step(model, [(stream, 50)])
        assert difference(all_logits(stream), reference(theirs, stream.tokens)) <= TOLERANCE

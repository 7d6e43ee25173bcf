"""Arenas in pieces: whatever they are cut into, what lies there at the end is the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights, LoraPair
from manylora.adapters.vocabulary import VOCABULARY, TokenDelta, TokenRows, VocabularyDelta
from manylora.loadtest.material.checkpoints import TINY
from manylora.loadtest.material.random_model import config_of
from manylora.server.kernels import pieces
from manylora.server.kernels.backend import RankArena
from manylora.server.kernels.cpu.arena import CpuArena, bytes_per_row
from manylora.server.kernels.plain.arena import PlainArena
from manylora.server.kernels.shape import DecoderShape
from manylora.server.kernels.step import RankRange
from manylora.server.model.config import ModelConfig

ROWS = 40


def plain(shape: DecoderShape) -> RankArena:
    return PlainArena(shape, ROWS, torch.bfloat16, torch.device("cpu"))


def native(shape: DecoderShape) -> RankArena:
    return CpuArena(shape, ROWS)


def buffers(arena: RankArena) -> list[Tensor]:
    if isinstance(arena, CpuArena):
        return [factor for pair in arena._modules.values() for factor in pair]
    assert isinstance(arena, PlainArena)
    return [factor for layer in arena.layers for pair in layer.pairs.values() for factor in pair]


def adapter(config: ModelConfig, rank: int) -> AdapterWeights:
    """Every second pair has a row less."""
    return AdapterWeights(
        {
            path: LoraPair(
                torch.randn(rank - number % 2, wide, dtype=torch.bfloat16),
                torch.randn(rank - number % 2, out, dtype=torch.bfloat16),
            )
            for number, (path, (out, wide)) in enumerate(config.base_modules().items())
        }
    )


@pytest.mark.parametrize("make", [plain, native])
@pytest.mark.parametrize("most", [100, 3000])
@pytest.mark.parametrize("by", [-3, -12, 2])
def test_what_is_written_and_moved_in_pieces_is_what_it_would_be_at_once(
    make: Callable[[DecoderShape], RankArena], most: int, by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the old place and the new overlap; a step waits for one piece at most."""
    config = config_of(TINY)
    weights = adapter(config, 10)
    ranges = {module: RankRange(14, 10) for module in config.module_shapes()}
    whole, cut = make(config.shape), make(config.shape)
    counts: list[int] = []
    for arena, size in ((whole, 1 << 40), (cut, most)):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        count = sum(1 for _ in arena.writing(ranges, weights))
        for module, owned in ranges.items():
            count += sum(1 for _ in arena.moving(module, owned, owned.start + by))
        counts.append(count)
    assert counts[1] > 2 * counts[0] or most > 100
    for one, other in zip(buffers(whole), buffers(cut), strict=True):
        assert torch.equal(one, other)
    at_once = make(config.shape)
    at_once.write({module: RankRange(14 + by, 10) for module in ranges}, weights)
    for one, other in zip(buffers(at_once), buffers(cut), strict=True):
        assert torch.equal(one[14 + by : 24 + by], other[14 + by : 24 + by])


@pytest.mark.parametrize("make", [plain, native])
def test_an_adapters_vocabulary_is_where_its_range_is(make: Callable[[DecoderShape], RankArena]) -> None:
    arena = make(config_of(TINY).shape)
    assert isinstance(arena, CpuArena | PlainArena)
    own = VocabularyDelta(4, TokenDelta(), TokenDelta(TokenRows(torch.ones(4, 8), None)))
    empty = arena.nbytes
    arena.write({VOCABULARY: RankRange(0, 2)}, AdapterWeights({}, vocabulary=own))
    assert list(arena.moving(VOCABULARY, RankRange(0, 2), 1)) == []
    assert arena.vocabularies.of(RankRange(1, 2)) is own
    assert arena.nbytes - empty == own.nbytes
    arena.release({VOCABULARY: RankRange(1, 2)})
    assert arena.nbytes == empty


def test_a_row_takes_its_share_of_the_native_arena() -> None:
    shape = config_of(TINY).shape
    assert sum(bytes_per_row(shape).values()) * native(shape).rows == native(shape).nbytes

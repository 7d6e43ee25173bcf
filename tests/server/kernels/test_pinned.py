"""What the host holds beside CUDA: the same weights, in one buffer."""

import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights, LoraPair
from manylora.server.kernels.pieces import PIECE_BYTES, moved, pieces
from manylora.server.kernels.pinned import pinned


def test_weights_lie_in_one_buffer_and_are_the_same() -> None:
    pairs = {
        f"layer{number}": LoraPair(
            torch.randn(rank, 7, dtype=torch.bfloat16), torch.randn(rank, 5, dtype=torch.bfloat16)
        )
        for number, rank in enumerate((1, 8, 3))
    }
    buffers: list[Tensor] = []

    def allocate(nbytes: int) -> Tensor:
        buffers.append(torch.full((nbytes,), 255, dtype=torch.uint8))
        return buffers[-1]

    held = pinned(AdapterWeights(pairs), allocate)
    (buffer,) = buffers
    assert held.nbytes == AdapterWeights(pairs).nbytes
    for path, pair in pairs.items():
        assert torch.equal(held.pairs[path].a, pair.a)
        assert torch.equal(held.pairs[path].b, pair.b)
        assert held.pairs[path].b.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_pieces_are_bounded_and_are_all_there_is() -> None:
    for count, nbytes in ((16, 100), (16, 16 * PIECE_BYTES // 3), (5, 50 * PIECE_BYTES), (0, 0)):
        cut = list(pieces(count, nbytes))
        assert [row for each in cut for row in range(each.start, each.stop)] == list(range(count))
        assert all(
            each.stop - each.start == 1 or (each.stop - each.start) * nbytes <= PIECE_BYTES * count
            for each in cut
        )
        assert list(moved(count, nbytes, down=False)) == cut[::-1]

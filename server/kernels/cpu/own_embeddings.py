"""Embeddings of a step's tokens that aren't the model's, and where the kernels find them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.cpu.model import CpuModel
from manylora.server.kernels.plain.vocabulary import StepVocabulary
from manylora.server.kernels.step import Ints


@dataclass(frozen=True, slots=True)
class OwnEmbeddings:
    """Those of the tokens that have some."""

    vocabulary: StepVocabulary
    addresses: npt.NDArray[np.uint64]
    """[tokens]: of f32 [hidden]; 0: the model's row is read."""
    rows: Tensor
    """float32 [tokens, hidden], of which others' are anything."""


def own_embeddings(kernels: Kernels, model: CpuModel, vocabulary: StepVocabulary, ids: Ints) -> OwnEmbeddings:
    """Compute them for a step's tokens."""
    rows = torch.empty(len(ids), model.structure.hidden)
    known = np.ascontiguousarray(vocabulary.base_ids(ids), dtype=np.int32)
    addresses = np.zeros(len(ids), dtype=np.uint64)
    for use in vocabulary.uses:
        own, part = rows[use.first : use.last], known[use.first : use.last]
        kernels.call("embedding", model.embedding_address, part.ctypes.data, len(part), own.data_ptr())
        addresses[use.first : use.last] = own.data_ptr() + np.arange(len(part)) * own.stride(0) * 4
    vocabulary.embed(ids, rows)
    return OwnEmbeddings(vocabulary, addresses, rows)

"""Embedding and head of a loaded base, as adapters are held against them."""

import logging
from pathlib import Path

from torch import Tensor

from manylora.adapters.vocabulary import TOKEN_MODULES, BaseVocabulary
from manylora.quant.checkpoint import Checkpoint
from manylora.quant.errors import QuantError
from manylora.quant.format import show_dense
from manylora.server.kernels.weights import DecoderWeights
from manylora.server.model.config import ModelConfig

log = logging.getLogger(__name__)


def vocabulary_of(directory: Path, config: ModelConfig, weights: DecoderWeights) -> BaseVocabulary:
    """Return those of the checkpoint in ``directory``, which is read whenever an adapter brings a whole module.

    Once that is gone, adapters' modules are kept whole.
    """

    def show(path: str) -> Tensor | None:
        try:
            return _shown(path)
        except (QuantError, OSError) as error:
            log.warning(
                "the base's rows can't be compared with an adapter's, which are kept whole: %s", error
            )
            return None

    def _shown(path: str) -> Tensor | None:
        checkpoint = Checkpoint(directory)
        names = [path] if not weights.tied else [path, *(each for each in TOKEN_MODULES if each != path)]
        found = next((f"{name}.weight" for name in names if f"{name}.weight" in checkpoint.names()), None)
        # A head of 4 bits has no rows to compare with.
        return None if found is None else show_dense(checkpoint, found)

    return BaseVocabulary(config.vocab_size, config.hidden_size, weights.tied, show)

"""An adapter as llama.cpp loads it beside its GGUF of the base: which pairs, by which names, in which order of rows.

llama.cpp computes W x + α/r · B (A x) with one α for the whole file and each pair's own r. Where an adapter's scale
isn't that of its usual α (patterns, rsLoRA, a mixture), the rest goes into B, in float64 and rounded once. Of Llama and
Mistral llama.cpp keeps the rows of q and k in another order: its rope turns neighbouring numbers,
transformers' those that are half a head apart.

Sources: llama.cpp's loading of adapters (src/llama-adapter.cpp) and its converters, release b7500 and later; the names
of tensors are those of the package ``gguf``. How the file is written: gguf_file.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.adapters.export.change import Factors, TrainedAdapter
from manylora.adapters.export.combine import Pair
from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.mixture import natural
from manylora.adapters.export.outline import EMBEDDING, HEAD, ModelOutline

_LLAMA = "llama"
ARCHITECTURES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": "qwen2", "qwen3": "qwen3"}
"""What llama.cpp calls a family."""
_TURNED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
"""Modules whose rows are in another order in its llama, and where a config says how many heads they have."""


@dataclass(frozen=True, slots=True)
class GgufPair:
    """One matrix's pair as it is in the file."""

    path: str
    """The module's in the Hugging Face model."""
    a: Tensor
    """lora_a: float32 [rank, in]; of the embedding [vocabulary, rank]"""
    b: Tensor
    """lora_b: float32 [out, rank], rows in llama.cpp's order; of the embedding [features, rank]"""


class GgufLora:
    """An adapter held against what the format holds. Raises ExportRefused, naming what has no place in it."""

    def __init__(
        self,
        adapter: TrainedAdapter,
        config: Mapping[str, object],
        outline: ModelOutline,
        is_the_bases: Callable[[str], bool],
    ) -> None:
        """``is_the_bases`` says whether a parameter that the adapter brings whole is but a copy of the base's.

        peft saves such copies of embedding and head beside their factors.
        """
        self.architecture = ARCHITECTURES[str(config["model_type"])]
        self._adapter = adapter
        self._config = config
        _check(adapter, outline, is_the_bases)
        self.names = sorted(adapter.changed, key=natural)
        """Of the parameters that it changes."""
        self._alphas = {name: _alpha(adapter, name) for name in self.names}
        told = Counter(alpha for alpha in self._alphas.values() if alpha != 0)
        # In llama.cpp an alpha of 0 is a scale of 1.
        self.alpha = float(torch.tensor(told.most_common(1)[0][0] if told else 1.0, dtype=torch.float32))
        """The file's, a float32's value."""

    @property
    def invocation(self) -> tuple[int, ...]:
        """Token ids from which on an activated adapter acts; () if it always does."""
        return self._adapter.spec.invocation

    @property
    def num_layers(self) -> int:
        """Layers of the base."""
        layers = self._config["num_hidden_layers"]
        assert isinstance(layers, int)
        return layers

    def pairs(self) -> Iterator[GgufPair]:
        """Yield what the file holds, in order, one read at a time. Raises InvalidAdapter for NaN or Inf."""
        for name in self.names:
            found = self._adapter.factors(name)
            assert found is not None
            path = name.removesuffix(".weight")
            b = self._ordered(path, self._folded(name, found))
            yield (
                GgufPair(path, b, found.a.T.contiguous()) if name == EMBEDDING else GgufPair(path, found.a, b)
            )

    def meant(self, pair: GgufPair) -> Pair:
        """Return (a, b) with which llama.cpp computes b a for a pair, rows in the Hugging Face model's order."""
        a, b = pair.a.double(), pair.b.double()
        if f"{pair.path}.weight" == EMBEDDING:
            a, b = b.T, a
        heads = self._heads(pair.path)
        if heads is not None:
            b = b.view(heads, -1, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)
        return a, b * (self.alpha / a.shape[0])

    def wanted(self, pair: GgufPair) -> Pair:
        """Return (a, b) of the adapter itself, its scale in b."""
        found = self._adapter.factors(f"{pair.path}.weight")
        assert found is not None
        return found.a.double(), found.b.double() * found.scale

    def _folded(self, name: str, found: Factors) -> Tensor:
        """Return B with what the file's α doesn't say of the scale."""
        factor = self._alphas[name] / self.alpha
        return found.b if factor == 1 else (found.b.double() * factor).float()

    def _ordered(self, path: str, b: Tensor) -> Tensor:
        heads = self._heads(path)
        if heads is None:
            return b.contiguous()
        return b.view(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape).contiguous()

    def _heads(self, path: str) -> int | None:
        """Return how many heads have their rows in another order; None: all rows are where they were."""
        field = _TURNED.get(path.rsplit(".", 1)[-1])
        if self.architecture != _LLAMA or field is None:
            return None
        heads = self._config.get(field) or self._config["num_attention_heads"]
        assert isinstance(heads, int)
        return heads


def _alpha(adapter: TrainedAdapter, name: str) -> float:
    """Return the α with which α/r is the scale of a matrix."""
    path = name.removesuffix(".weight")
    return adapter.spec.scale_of(path) * adapter.spec.rank_of(path)


def _check(adapter: TrainedAdapter, outline: ModelOutline, is_the_bases: Callable[[str], bool]) -> None:
    if adapter.spec.use_dora:
        raise ExportRefused(
            "DoRA has no place in a gguf-lora, which holds factors alone: --format merged makes a whole model of it,"
            " which llama.cpp's converter takes"
        )
    tied = next((name for name in (EMBEDDING, HEAD) if outline.tied and adapter.touches(name)), None)
    if tied is not None:
        raise ExportRefused(
            f"the adapter changes {tied}, and in this base embedding and head are one matrix, which llama.cpp can't"
            " change for one of them: --format merged makes a whole model of it"
        )
    whole = next((name for name in adapter.replaced if not is_the_bases(name)), None)
    if whole is not None:
        raise ExportRefused(
            f"the adapter brings {whole} whole, and a gguf-lora holds factors alone: --format merged"
            " makes a whole model of it, which llama.cpp's converter takes"
        )

"""The same greedy completions by transformers + peft, one at a time: what the server's answers are held against."""

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora.adapters.tokenizer import has_tokenizer, load_tokenizer
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.manylora_client import Ask
from manylora.loadtest.material.peft_adapters import PeftAdapter, load_base, load_peft_adapter
from manylora.quant.nf4 import quantize_nf4

TOLERANCE = 1e-3
"""Of log probabilities in float32; a wrong token or adapter is off by far more."""
NEAR = 0.1
"""Of log probabilities by native kernels, the mean over an answer's tokens: activations have 8 bits there, adapters 16.
On this random base it is 0.01 to 0.03, and between two adapters 0.3 to 0.8."""
Mixtures = Mapping[str, Sequence[tuple[str, float]]]
"""(adapter, weight) pairs by a model's name."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer's token ids and their log probabilities."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def distance(self, logprobs: Sequence[float]) -> float:
        """Return the mean absolute difference to somebody else's log probabilities of the same tokens."""
        return statistics.fmean(abs(a - b) for a, b in zip(self.logprobs, logprobs, strict=True))


class Reference:
    """A base in float32 and its adapters by name, and mixtures of these; names that are none of them are the base."""

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, Path],
        mixtures: Mixtures | None = None,
        quantization: str = "none",
        kinds: Mapping[str, PeftAdapter] | None = None,
    ) -> None:
        """``nf4``: linear layers hold what that leaves. ``kinds``: of the adapters that aren't plain."""
        self._directory = base
        self._sources = dict(adapters)
        self._mixtures = dict(mixtures or {})
        self._kinds = dict(kinds or {})
        self._tokenizers: dict[Path, Any] = {}
        model = load_base(base)
        model.generation_config.eos_token_id = None  # the bars ask for a fixed number of tokens
        model.generation_config.pad_token_id = 0
        if quantization == "nf4":
            _round_to_nf4(model)
        self._base = model

    def answer(self, ask: Ask) -> Answer:
        """Return the answer, without batching."""
        said = self.say(ask)
        tokenizer = self._tokenizer(ask.model)
        tokens = [tokenizer.decode([token]) for token in said.ids]
        return Answer(finish_reason="length", tokens=tokens, logprobs=list(said.logprobs))

    def say(self, ask: Ask) -> Said:
        """Return the answer as ids."""
        model = self._model(ask.model)
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor([ask.prompt]),
                attention_mask=torch.ones(1, len(ask.prompt), dtype=torch.long),
                max_new_tokens=ask.max_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        ids = out.sequences[0, len(ask.prompt) :].tolist()
        each = [float(logits[0].log_softmax(-1)[t]) for t, logits in zip(ids, out.logits, strict=True)]
        return Said(tuple(ids), tuple(each))

    def _model(self, name: str) -> Any:
        if name in self._sources:
            return self._adapted(name)
        if name not in self._mixtures:
            return self._base
        from manylora.loadtest.material.peft_mixture import merged_sum

        return merged_sum(
            self._base, ((self._adapted(part), weight) for part, weight in self._mixtures[name])
        )

    def _adapted(self, name: str) -> Any:
        """Return peft's model, of a base of its own: some kinds change what they are put on."""
        kind = self._kinds.get(name, PeftAdapter(name))
        return load_peft_adapter(copy.deepcopy(self._base), self._sources[name], kind)

    def _tokenizer(self, name: str) -> Any:
        own = self._sources.get(name, self._directory)
        folder = own if has_tokenizer(own) else self._directory
        if folder not in self._tokenizers:
            self._tokenizers[folder] = load_tokenizer(folder)
        return self._tokenizers[folder]


def agrees(served: Answer, reference: Answer) -> bool:
    """Whether the tokens are equal and their log probabilities within TOLERANCE."""
    if not served.complete or served.tokens != reference.tokens:
        return False
    pairs = zip(served.logprobs, reference.logprobs, strict=True)
    return all(abs(one - other) <= TOLERANCE for one, other in pairs)


def _round_to_nf4(model: Any) -> None:
    """Give the linear layers the values that NF4 holds of them. The head stays."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                module.weight.copy_(quantize_nf4(module.weight.detach()).dequantize(torch.float32))

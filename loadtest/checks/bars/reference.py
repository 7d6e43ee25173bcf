"""The same greedy completions by transformers + peft, one at a time: what the server's answers are held against."""

import contextlib
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from manylora.adapters.tokenizer import load_tokenizer
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.manylora_client import Ask
from manylora.quant.nf4 import quantize_nf4

TOLERANCE = 1e-3
"""Of log probabilities in float32; a wrong token or adapter is off by far more."""
NEAR = 0.1
"""Of log probabilities by native kernels, the mean over an answer's tokens: activations have 8 bits there, adapters 16.
On this random base it is 0.01 to 0.03, and between two adapters 0.3 to 0.8."""


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
        mixtures: Mapping[str, Sequence[tuple[str, float]]] | None = None,
        quantization: str = "none",
    ) -> None:
        """``mixtures`` are (name of an adapter, weight) pairs; ``nf4``: linear layers hold what that leaves."""
        self._tokenizer = load_tokenizer(base)
        self._sources = dict(adapters)
        self._mixtures = dict(mixtures or {})
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        model.generation_config.eos_token_id = None  # the bars ask for a fixed number of tokens
        model.generation_config.pad_token_id = 0
        if quantization == "nf4":
            _round_to_nf4(model)
        self._base = model.eval()

    def answer(self, ask: Ask) -> Answer:
        """Return the answer, without batching."""
        said = self.say(ask)
        tokens = [self._tokenizer.decode([token]) for token in said.ids]
        return Answer(finish_reason="length", tokens=tokens, logprobs=list(said.logprobs))

    @torch.inference_mode()
    def say(self, ask: Ask) -> Said:
        """Return the answer as ids."""
        with self._adapted(ask.model) as model:
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

    @contextlib.contextmanager
    def _adapted(self, name: str) -> Iterator[PreTrainedModel]:
        """Load the adapter, give the model, and forget the adapter: a thousand of them must not pile up."""
        parts = self._mixtures.get(name, [(name, 1.0)] if name in self._sources else [])
        if not parts:
            yield self._base
            return
        from peft import PeftModel

        from manylora.loadtest.material.peft_mixture import mixed

        # peft takes no dots in the names of adapters.
        numbered = [(f"part{number}", weight) for number, (_, weight) in enumerate(parts)]
        with warnings.catch_warnings():
            # peft asks transformers for an attribute that it has renamed.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            sources = [self._sources[part] for part, _ in parts]
            model = PeftModel.from_pretrained(self._base, sources[0], adapter_name="part0")
            for number, source in enumerate(sources[1:], 1):
                model.load_adapter(source, adapter_name=f"part{number}")
        try:
            if name in self._mixtures:
                with mixed(model, numbered) as combined:
                    yield combined
            else:
                yield model.eval()
        finally:
            model.unload()


def agrees(served: Answer, reference: Answer) -> bool:
    """Whether the tokens are equal and their log probabilities within TOLERANCE."""
    if not served.complete or served.tokens != reference.tokens:
        return False
    pairs = zip(served.logprobs, reference.logprobs, strict=True)
    return all(abs(one - other) <= TOLERANCE for one, other in pairs)


def _round_to_nf4(model: PreTrainedModel) -> None:
    """Give the linear layers the values that NF4 holds of them. The head stays."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                module.weight.copy_(quantize_nf4(module.weight.detach()).dequantize(torch.float32))

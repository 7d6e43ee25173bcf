"""Checks that activated adapters (aLoRA) are exact: in one batch with plain ones, mixtures and the base, against peft.

As loadtest/checks/mixture_exactness.py, on small random models and with nothing but torch, transformers, peft and
safetensors. peft answers what it can: adapters alone. Mixtures with an activated part it has no word for; there the
reference is transformers' model with the parts' products added by hand, each from its own token on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights
from manylora.loadtest.checks.exactness import (
    Outcome,
    difference,
    least_difference,
    load_reference,
    logits_of,
    prompt,
    read,
    within,
)
from manylora.loadtest.material.checkpoints import (
    ALL_LINEAR,
    AdapterShape,
    BaseShape,
    write_adapter,
    write_base,
)
from manylora.loadtest.material.engines import EngineSizes, add_adapter, build_engine
from manylora.loadtest.material.quiet import advice_off
from manylora.server.engine.request import GenerationRequest, SamplingParams, TokenLogprobs
from manylora.server.kernels.plain import PlainBackend
from manylora.server.model.decoder import Decoder
from manylora.server.model.loader import Quantization, load_weights

TOLERANCE = 1e-4
"""Of log probabilities in float32 beside transformers' and peft's."""
SHAPE = BaseShape("qwen2", 320, 128, 192, 2, 4, 2, 512)
NEW_TOKENS = 12
TALK = 83
"""Tokens of the conversation that all prompts begin with: five blocks and a part of one."""
WORDS = (101, 102, 103)
OTHER, LONG = (104,), (105, 106, 107, 108, 109)
SHAPES = (
    AdapterShape(8, 12.0, ALL_LINEAR, 1, invocation=WORDS),
    AdapterShape(16, 12.0, ("q_proj", "v_proj"), 2, rslora=True, invocation=OTHER),
    AdapterShape(4, 12.0, ("gate_proj", "down_proj", "k_proj"), 3, invocation=LONG),
    AdapterShape(8, 12.0, ALL_LINEAR, 4),
    AdapterShape(32, 12.0, ("o_proj", "up_proj"), 5),
)
Parts = tuple[tuple[int, float], ...]
"""(number of an adapter, weight) pairs in order; () is the base."""
USES: tuple[Parts, ...] = (
    (),
    *(((number, 1.0),) for number in range(len(SHAPES))),
    ((0, 0.5),),
    ((0, 1.0), (1, -0.75)),
    ((0, 1.25), (3, 0.5)),
    ((0, 0.5), (1, 0.5), (2, 0.5), (4, 0.5)),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt for the base with some adapters."""

    parts: Parts
    prompt: tuple[int, ...]


@dataclass(slots=True)
class Answer:
    """What the engine answered."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached: int = 0


def asked() -> list[Asked]:
    """Return every use of adapters with prompts that invoke none, each one, all, and one of them twice."""
    talk = [token % 100 for token in prompt(TALK)]
    prompts = [
        [*talk, *WORDS, *talk[:3], *OTHER, *LONG, *talk[3:9]],
        [*talk[:20], *WORDS, *LONG, *talk[20:], *OTHER, *WORDS],
        [*talk[:48], *OTHER],
        talk,
    ]
    return [Asked(parts, tuple(each)) for each in prompts for parts in USES]


def check_activated(scratch: Path, device: torch.device) -> Iterator[Outcome]:
    """Hold the batch against each request alone, peft token for token, and the products added by hand."""
    base = write_base(scratch / "activated", SHAPE, seed=6)
    paths = [write_adapter(scratch / f"activated{n}", base, shape) for n, shape in enumerate(SHAPES)]
    wanted = asked()
    decoder = load_decoder(base, PlainBackend(device, torch.float32), "none")
    adapters = [read(path, decoder) for path in paths]
    together = answers(decoder, adapters, wanted, together=True)
    alone = [answers(decoder, adapters, [each], together=True)[0] for each in wanted]
    shared = answers(decoder, adapters, wanted, together=False)
    hit = sum(each.cached for each in shared)
    for name, found in (("in one batch", together), ("one after the other, prefixes shared", shared)):
        equal = sum(_same(one, other, device) for one, other in zip(found, alone, strict=True))
        yield _all(f"activated: {name}, the engine gives each what it gives it alone", equal, len(wanted))
    yield Outcome(
        "activated: prefixes were shared", hit > TALK * len(USES), f"{hit} tokens came from the cache"
    )

    by_hand = ByHand(load_reference(base, device), paths)
    theirs = [
        by_hand.logits(each.parts, each.prompt, [*each.prompt, *answer.tokens])
        for each, answer in zip(wanted, together, strict=True)
    ]
    equal = sum(follows(answer.tokens, logits) for answer, logits in zip(together, theirs, strict=True))
    yield _all("activated: tokens are those of products that are added by hand", equal, len(wanted))
    worst = max(distance(answer, logits) for answer, logits in zip(together, theirs, strict=True))
    yield within("activated: so are the log probabilities", worst, TOLERANCE)

    yield _hold_against_peft(base, paths, wanted, together, device)
    different = len(
        {(each.prompt, tuple(answer.tokens)) for each, answer in zip(wanted, together, strict=True)}
    )
    # Uses of which nothing acts are the base.
    acting = {(each.prompt, by_hand.acting(each.parts, each.prompt)) for each in wanted}
    told = f"{different} answers, {len(acting)} ways in which adapters act"
    yield Outcome(
        "activated: answers differ by what acts and by nothing else", different == len(acting), told
    )


def _hold_against_peft(
    base: Path, paths: Sequence[Path], wanted: Sequence[Asked], found: Sequence[Answer], device: torch.device
) -> Outcome:
    """Hold the answers of the base and of single adapters, all that peft has a word for, token for token."""
    single = [
        n for n, each in enumerate(wanted) if len(each.parts) < 2 and all(w == 1 for _, w in each.parts)
    ]
    expected = peft_answers(base, paths, [wanted[n] for n in single], device)
    equal = sum(found[n].tokens == tokens for n, tokens in zip(single, expected, strict=True))
    return _all("activated: tokens are peft's, activated or not", equal, len(single))


def load_decoder(base: Path, backend: PlainBackend, quantization: Quantization) -> Decoder:
    """Return a checkpoint's decoder."""
    config, weights, _ = load_weights(base, backend, quantization=quantization)
    return Decoder(config, weights, backend)


def answers(
    decoder: Decoder, adapters: Sequence[AdapterWeights], wanted: Sequence[Asked], *, together: bool
) -> list[Answer]:
    """Ask greedily, all at once or one after the other of one engine, and return the answers in order."""
    context = max(len(each.prompt) for each in wanted) + NEW_TOKENS
    rows = sum(shape.rank for shape in SHAPES)
    engine = build_engine(decoder, EngineSizes(max(8, len(wanted)), context, rows, max_step_tokens=200))
    for number, weights in enumerate(adapters):
        add_adapter(engine, number + 1, weights)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=3)
    found: dict[str, Answer] = {}
    for number, each in enumerate(wanted):
        parts = tuple((part + 1, weight) for part, weight in each.parts)
        found[str(number)] = Answer()
        engine.add_request(GenerationRequest(str(number), each.prompt, sampling, parts))
        while len(engine.requests) and (not together or number == len(wanted) - 1):
            engine.step()
            for output in engine.requests.take_outputs():
                if output.error is not None:
                    raise output.error
                answer = found[output.request_id]
                answer.tokens += output.token_ids
                answer.logprobs += output.logprobs
                answer.cached = output.cached_tokens
    engine.check_integrity()
    return list(found.values())


class ByHand:
    """transformers' model with factors read from the files of SHAPES, added to each linear layer's output by token."""

    def __init__(self, model: Any, paths: Sequence[Path]) -> None:
        from safetensors.torch import load_file

        self._model = model
        self._device = next(model.parameters()).device
        self._factors = [load_file(path / "adapter_model.safetensors", str(self._device)) for path in paths]

    @staticmethod
    def acting(parts: Parts, prompt: Sequence[int]) -> tuple[tuple[int, float, int], ...]:
        """Return (number, weight, first token) of the parts that act."""
        found = []
        for number, weight in parts:
            words = list(SHAPES[number].invocation)
            places = range(len(prompt) - len(words), -1, -1)
            starts = (place for place in places if list(prompt[place : place + len(words)]) == words)
            start = next(starts, None) if words else 0
            if start is not None:
                found.append((number, weight, start))
        return tuple(found)

    def logits(self, parts: Parts, prompt: Sequence[int], text: list[int]) -> Tensor:
        """Return the logits of all tokens of a text that begins with a prompt: float32 [tokens, vocab]."""
        with self._adding(self.acting(parts, prompt)):
            return logits_of(self._model, text, self._device)

    @contextmanager
    def _adding(self, acting: Sequence[tuple[int, float, int]]) -> Iterator[None]:
        hooks = [
            module.register_forward_hook(self._hook(name, acting))
            for name, module in self._model.named_modules()
            if name.rpartition(".")[2] in ALL_LINEAR
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str, acting: Sequence[tuple[int, float, int]]) -> Any:
        def add(module: object, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (x,) = given
            for number, weight, start in acting:
                names = (f"base_model.model.{name}.lora_{half}.weight" for half in "AB")
                a, b = map(self._factors[number].get, names)
                if a is not None and b is not None:
                    product = x[:, start:] @ a.T @ b.T * (weight * SHAPES[number].scale)
                    output = torch.cat((output[:, :start], output[:, start:] + product), dim=1)
            return output

        return add


def peft_answers(
    base: Path, paths: Sequence[Path], wanted: Sequence[Asked], device: torch.device
) -> list[list[int]]:
    """Return what peft's generate answers greedily to prompts for the base or one adapter, each alone."""
    from peft import PeftModel

    with advice_off():
        model = PeftModel.from_pretrained(load_reference(base, device), paths[0], adapter_name="0")
        for number, path in enumerate(paths[1:], 1):
            model.load_adapter(path, adapter_name=str(number))
        model.eval()
        found = []
        for each in wanted:
            ids = torch.tensor([each.prompt], device=device)
            told: dict[str, Any] = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "max_new_tokens": NEW_TOKENS,
                "min_new_tokens": NEW_TOKENS,
                "do_sample": False,
                "pad_token_id": 0,
                "eos_token_id": None,
            }
            if each.parts:
                model.set_adapter(str(each.parts[0][0]))
                out = model.generate(**told)
            else:
                with model.disable_adapter():
                    out = model.generate(**told)
            found.append([int(token) for token in out[0, len(each.prompt) :]])
    return found


def follows(tokens: Sequence[int], logits: Tensor) -> bool:
    """Whether the last tokens of a text are those that the text's logits make the best."""
    return bool(logits[-len(tokens) - 1 : -1].argmax(-1).tolist() == list(tokens))


def distance(answer: Answer, logits: Tensor) -> float:
    """Return how far an answer's log probabilities are from what logits of its text make of them."""
    each = logits[-len(answer.tokens) - 1 : -1].log_softmax(-1)
    right = each[torch.arange(len(answer.tokens)), torch.tensor(answer.tokens)].cpu()
    return difference(right, torch.tensor([told.logprob for told in answer.logprobs]))


def _same(one: Answer, other: Answer, device: torch.device) -> bool:
    whole = len(one.tokens) == NEW_TOKENS and one.tokens == other.tokens
    return whole and (one.logprobs == other.logprobs or least_difference(device) > 0)


def _all(name: str, good: int, total: int) -> Outcome:
    return Outcome(name, good == total, f"{good} of {total}")

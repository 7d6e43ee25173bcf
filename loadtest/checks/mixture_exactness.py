"""Checks that mixtures are exact: sixteen in one batch with plain adapters and the base, against peft and themselves.

As loadtest/checks/exactness.py, on small random models and with nothing but torch, transformers, peft and safetensors.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights
from manylora.loadtest.checks.exactness import (
    Outcome,
    difference,
    interleave,
    least_difference,
    load_reference,
    logits_of,
    prompt,
    read,
    within,
)
from manylora.loadtest.material.by_hand import Row, load, place, step
from manylora.loadtest.material.checkpoints import (
    ALL_LINEAR,
    AdapterShape,
    BaseShape,
    write_adapter,
    write_base,
)
from manylora.loadtest.material.engines import EngineSizes, add_adapter, build_engine
from manylora.loadtest.material.quiet import advice_off
from manylora.server.engine.request import GenerationRequest, SamplingParams
from manylora.server.kernels.plain import PlainBackend
from manylora.server.model.decoder import Decoder

TOLERANCE = 1e-5
"""Of logits in float32 beside peft's on a CPU; on a GPU, what the same row may differ by in other company."""
MIXTURES = 16
NEW_TOKENS = 16
LONGEST_PROMPT = 71
SHAPE = BaseShape("qwen2", 320, 128, 192, 2, 4, 2, 512)
"""Small, so that what float32 loses in peft and here stays well under TOLERANCE."""
RANKS = (1, 2, 64, 8, 16, 4, 32, 3, 24, 12)
TARGETS: tuple[tuple[str, ...], ...] = (
    ALL_LINEAR,
    ("q_proj", "v_proj"),
    ("o_proj", "down_proj"),
    ("gate_proj", "up_proj", "k_proj"),
)
DORA = (3, 4, 7)
"""Adapters that scale the base's outputs too, by number."""
Parts = tuple[tuple[int, float], ...]
"""(number of an adapter, weight) pairs in order; () is the base."""


@dataclass(slots=True)
class Told:
    """What the engine answered: tokens, and the log probabilities of each and of the next best."""

    tokens: list[int]
    logprobs: list[object]


def adapter_shapes() -> list[AdapterShape]:
    """Return ranks of 1 to 64, each kind of targets, each rule of scaling, LoRA and DoRA."""
    return [
        AdapterShape(
            rank,
            0.75 * rank + 2,
            TARGETS[number % len(TARGETS)],
            100 + number,
            0.3,
            rslora=number % 3 == 0,
            dora=number in DORA,
        )
        for number, rank in enumerate(RANKS)
    ]


def draw_mixtures(count: int, adapters: int, seed: int) -> list[Parts]:
    """Return different mixtures of 2 to 8 parts, by number; weights above 1 and below 0, float32's values."""
    rng = random.Random(seed)
    found: list[Parts] = []
    for number in range(count):
        chosen = sorted(rng.sample(range(adapters), 2 + number % 7))
        weights = torch.tensor([rng.uniform(-0.9, 0.9) for _ in chosen])
        # One is above 1 and one below -1 in each: the first and the last.
        weights[0], weights[-1] = weights[0].abs() + 1, -weights[-1].abs() - 1
        found.append(tuple(zip(chosen, weights.tolist(), strict=True)))
    return found


def kinds() -> list[Parts]:
    """Return what is in the batch: the mixtures, each adapter alone, and the base."""
    singles: list[Parts] = [((number, 1.0),) for number in range(len(RANKS))]
    return [*draw_mixtures(MIXTURES, len(RANKS), seed=1), *singles, ()]


def check_mixtures(scratch: Path, device: torch.device) -> Iterator[Outcome]:
    """Hold the batch against peft's cat, token for token and in logits, and each of it against itself alone."""
    base = write_base(scratch / "mixtures", SHAPE, seed=5)
    paths = [
        write_adapter(scratch / f"part{number}", base, shape) for number, shape in enumerate(adapter_shapes())
    ]
    asked = kinds()
    model = load(base, PlainBackend(device, torch.float32), len(asked), "none")
    adapters = [read(path, model.decoder) for path in paths]
    together = _answers(model.decoder, adapters, asked, together=True)
    alone = _answers(model.decoder, adapters, asked, together=False)
    equal = sum(_same(one, other, device) for one, other in zip(together, alone, strict=True))
    yield _all("mixtures: the engine gives each in one batch what it gives it alone", equal, len(asked))

    texts = [_prompt(number) + answer.tokens for number, answer in enumerate(together)]
    placed = place(model, adapters)
    uses = [tuple((placed[part], weight) for part, weight in parts) for parts in asked]
    mixed, single = (
        [Row(number, text, use) for number, (text, use) in enumerate(zip(texts, uses, strict=True))]
        for _ in range(2)
    )
    interleave(lambda work: step(model, work), mixed)
    for row in single:
        step(model, [(row, len(row.tokens))])
    ours = [row.all_logits() for row in mixed]
    worst = max(difference(a, b.all_logits()) for a, b in zip(ours, single, strict=True))
    yield within(
        "mixtures: in one batch each has the logits of its run alone", worst, least_difference(device)
    )

    theirs = _by_peft(base, paths, list(zip(asked, texts, strict=True)), device)
    worst, limit = max(map(difference, ours, theirs)), max(TOLERANCE, least_difference(device))
    yield within(
        f"mixtures: {MIXTURES} of 2 to 8 adapters, DoRA among them, have peft's logits", worst, limit
    )
    equal = sum(_follows(answer, logits) for answer, logits in zip(together, theirs, strict=True))
    yield _all("mixtures: the tokens are peft's", equal, len(asked))
    ends = [logits[0] for logits in ours]  # the first token is the same in all
    apart = min(difference(a, b) for number, a in enumerate(ends) for b in ends[:number])
    yield Outcome("mixtures: they differ at all", apart > 1000 * TOLERANCE, f"by {apart:.2g} at least")


def _prompt(number: int) -> list[int]:
    """Return prompt ``number``: beginnings of one text, so that a prefix of another mixture would be found."""
    return prompt(LONGEST_PROMPT)[: 1 + 7 * number % LONGEST_PROMPT]


def _all(name: str, good: int, total: int) -> Outcome:
    return Outcome(name, good == total, f"{good} of {total}")


def _answers(
    decoder: Decoder, adapters: Sequence[AdapterWeights], asked: Sequence[Parts], *, together: bool
) -> list[Told]:
    """Ask for all of ``asked`` greedily, at once or one after the other, and return the answers in order."""
    context = LONGEST_PROMPT + NEW_TOKENS
    engine = build_engine(
        decoder, EngineSizes(len(asked), context, sum(RANKS) + len(DORA), max_step_tokens=200)
    )
    for number, weights in enumerate(adapters):
        add_adapter(engine, number + 1, weights)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=3)
    found: dict[str, Told] = {}
    for number, use in enumerate(asked):
        parts = tuple((part + 1, weight) for part, weight in use)
        found[str(number)] = Told([], [])
        engine.add_request(GenerationRequest(str(number), tuple(_prompt(number)), sampling, parts))
        while len(engine.requests) and (not together or number == len(asked) - 1):
            engine.step()
            for output in engine.requests.take_outputs():
                if output.error is not None:
                    raise output.error
                found[output.request_id].tokens += output.token_ids
                found[output.request_id].logprobs += output.logprobs
    engine.check_integrity()
    return list(found.values())


def _same(one: Told, other: Told, device: torch.device) -> bool:
    """Whether two answers are equal, to the bit where that is promised."""
    whole = len(one.tokens) == NEW_TOKENS and one.tokens == other.tokens
    return whole and (one.logprobs == other.logprobs or least_difference(device) > 0)


def _by_peft(
    base: Path, paths: Sequence[Path], asked: Sequence[tuple[Parts, list[int]]], device: torch.device
) -> list[Tensor]:
    """Return the logits of all tokens of each text by peft: float32 [tokens, vocab]."""
    from peft import PeftModel

    from manylora.loadtest.material.peft_mixture import mixed, summed

    with advice_off():
        model = PeftModel.from_pretrained(load_reference(base, device), paths[0], adapter_name="0")
        for number, path in enumerate(paths[1:], 1):
            model.load_adapter(path, adapter_name=str(number))
        found = []
        for parts, text in asked:
            if not parts:
                with model.disable_adapter():
                    found.append(logits_of(model, text, device))
            else:
                way = mixed if all(part not in DORA for part, _ in parts) else summed
                with way(model, [(str(part), weight) for part, weight in parts]) as adapted:
                    found.append(logits_of(adapted, text, device))
    return found


def _follows(answer: Told, logits: Tensor) -> bool:
    """Whether the answer's tokens, the last of a text, are those that the logits of the text make the best."""
    best = logits[-len(answer.tokens) - 1 : -1].argmax(-1).tolist()
    return bool(best == answer.tokens)

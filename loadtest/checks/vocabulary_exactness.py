"""Checks that adapters which change embedding and head are exact: all kinds in one batch with plain adapters, a mixture
and the base, against peft and against themselves alone.

As loadtest/checks/exactness.py, on small random models; needs torch, transformers, peft, safetensors and tokenizers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manylora.adapters.reader import read_adapter
from manylora.adapters.types import AdapterWeights, ModuleShape
from manylora.loadtest.checks.exactness import (
    Outcome,
    difference,
    interleave,
    least_difference,
    load_reference,
    logits_of,
    prompt,
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
from manylora.loadtest.material.peft_adapters import (
    PeftAdapter,
    load_base,
    load_peft_adapter,
    tied_kinds,
    token_kinds,
    write_peft_adapter,
)
from manylora.server.engine.request import GenerationRequest, SamplingParams
from manylora.server.kernels.backend import AnyBackend
from manylora.server.model.decoder import Decoder
from manylora.server.model.vocabulary import vocabulary_of

SHAPE = BaseShape("qwen2", 320, 128, 192, 2, 4, 2, 512)
NEW_TOKENS, PROMPT = 12, 21
Parts = tuple[tuple[int, float], ...]
"""(number of an adapter, weight) pairs; () is the base."""


@dataclass(slots=True)
class Asked:
    """What is in the batch."""

    name: str
    parts: Parts
    size: int | None
    """Ids that it has, if another number than the base's."""
    prompt: list[int]


def check_vocabularies(scratch: Path, backend: AnyBackend, limit: float, *, tied: bool) -> Iterator[Outcome]:
    """Hold the kinds against peft in logits, to ``limit`` of their spread, and where that is exact token for token."""
    where, device = "tied head" if tied else "own head", backend.device
    base = write_base(scratch / "base", replace(SHAPE, tied=tied), seed=3)
    kinds = [*token_kinds(SHAPE.vocab_size), *(tied_kinds() if tied else ())]
    paths = [write_peft_adapter(scratch / str(i), base, kind, i) for i, kind in enumerate(kinds)]
    paths.append(write_adapter(scratch / "plain", base, AdapterShape(8, 16.0, ALL_LINEAR, 77)))
    model = load(base, backend, 4 + len(paths), "none")
    adapters = [_read(path, model.decoder, base) for path in paths]
    asked = _asked(kinds)
    together = _answers(model.decoder, adapters, asked, together=True)
    alone = _answers(model.decoder, adapters, asked, together=False)
    wrong = [each.name for each, a, b in zip(asked, together, alone, strict=True) if a != b]
    yield Outcome(
        f"{where}: in one batch each answers as alone", not wrong or device.type != "cpu", str(wrong)
    )

    placed = place(model, adapters)
    texts = [each.prompt + answer for each, answer in zip(asked, together, strict=True)]
    uses = [tuple((placed[part], weight) for part, weight in each.parts) for each in asked]
    mixed, single = (
        [Row(i, text, use) for i, (text, use) in enumerate(zip(texts, uses, strict=True))] for _ in "ab"
    )
    interleave(lambda work: step(model, work), mixed)
    for row in single:
        step(model, [(row, len(row.tokens))])
    worst = max(difference(a.all_logits(), b.all_logits()) for a, b in zip(mixed, single, strict=True))
    yield within(
        f"{where}: in one batch each has the logits of its run alone", worst, least_difference(device)
    )
    for each, row, answer in zip(asked, mixed, together, strict=True):
        theirs = _by_peft(base, paths, kinds, each, row.tokens, device)
        ours = row.all_logits().to(theirs.device)
        off = difference(ours, theirs) / float(theirs.std())
        yield within(f"{where}: {each.name} has peft's logits", off, limit)
        if limit < 1e-3:
            follows = theirs[len(each.prompt) - 1 : -1].argmax(-1).tolist() == answer
            yield Outcome(f"{where}: {each.name} has peft's tokens", follows, f"{answer}")


def _asked(kinds: list[PeftAdapter]) -> list[Asked]:
    found = []
    for number, kind in enumerate(kinds):
        tokens = prompt(PROMPT, number)
        if kind.size is not None and kind.size > SHAPE.vocab_size:
            tokens[3], tokens[9] = SHAPE.vocab_size, kind.size - 1
        if kind.size is not None and kind.size < SHAPE.vocab_size:
            tokens = [min(token, kind.size - 1) for token in tokens]
        tokens[5] = 9  # a trained row
        found.append(Asked(kind.name, ((number, 1.0),), kind.size, tokens))
    plain = len(kinds)
    found.append(Asked("plain LoRA", ((plain, 1.0),), None, prompt(PROMPT)))
    # Whole modules, rows and factors, weighed.
    mixed = [number for number, kind in enumerate(kinds) if kind.size is None][:7]
    found.append(
        Asked(
            "a mixture",
            tuple((number, 0.25 * (1 + number % 3)) for number in (*mixed, plain)),
            None,
            prompt(PROMPT),
        )
    )
    found.append(Asked("the base", (), None, prompt(PROMPT)))
    return found


def _read(path: Path, decoder: Decoder, base: Path) -> AdapterWeights:
    config = decoder.config
    modules = {name: ModuleShape(out, wide) for name, (out, wide) in config.base_modules().items()}
    return read_adapter(
        path,
        modules,
        max_rank=64,
        dtype=decoder.backend.dtype,
        vocab_size=config.vocab_size,
        vocabulary=vocabulary_of(base, config, decoder.weights),
    ).weights


def _answers(
    decoder: Decoder, adapters: list[AdapterWeights], asked: list[Asked], *, together: bool
) -> list[list[int]]:
    engine = build_engine(decoder, EngineSizes(len(asked), PROMPT + NEW_TOKENS, 64, max_step_tokens=100))
    for number, weights in enumerate(adapters):
        add_adapter(engine, number + 1, weights)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    found: dict[str, list[int]] = {}
    for number, each in enumerate(asked):
        parts = tuple((part + 1, weight) for part, weight in each.parts)
        found[str(number)] = []
        request = GenerationRequest(str(number), tuple(each.prompt), sampling, parts, vocab_size=each.size)
        engine.add_request(request)
        while len(engine.requests) and (not together or number == len(asked) - 1):
            engine.step()
            for output in engine.requests.take_outputs():
                if output.error is not None:
                    raise output.error
                found[output.request_id] += output.token_ids
    engine.check_integrity()
    return list(found.values())


def _by_peft(
    base: Path,
    paths: list[Path],
    kinds: list[PeftAdapter],
    asked: Asked,
    tokens: list[int],
    device: torch.device,
) -> Tensor:
    """Return the logits of what peft makes of the adapters: of one as it loads it, of several of their changes' sum."""
    from manylora.loadtest.material.peft_mixture import merged_sum

    every = [*kinds, PeftAdapter("plain")]

    def adapted(part: int) -> Any:
        return load_peft_adapter(load_base(base), paths[part], every[part]).to(device)

    model = load_reference(base, device)
    if len(asked.parts) == 1:
        [(number, _)] = asked.parts
        model = adapted(number)
    elif asked.parts:
        model = merged_sum(model, ((adapted(part), weight) for part, weight in asked.parts))
    return logits_of(model, tokens, device)

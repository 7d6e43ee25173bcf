"""A sampler, and masks, for each number of ids that a step's rows choose from: the base's, and those of adapters that
bring tokens. A row meets nobody's ids but its own.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from manylora.server.engine.grammar import GrammarFault, Masks, Matcher, Words
from manylora.server.engine.logits import SamplingRow
from manylora.server.engine.prompt_logprobs import LogprobRows
from manylora.server.engine.sampler import SampledToken, SampleFault, Sampler
from manylora.server.kernels.output import StepOutput

MOST_SIZES = 8
"""Numbers of ids whose samplers are kept beside the base's, the last that were used: each has memory for a few rows."""


class Samplers:
    """Not thread-safe."""

    def __init__(self, base: Sampler) -> None:
        self._base = base
        # Threads that kernels have on the same cores wait for their next step without giving them up at once.
        self._threads = max(1, len(os.sched_getaffinity(0)) // 2)
        self._masks = Masks(base.vocab_size, self._threads)
        self._others: OrderedDict[int, tuple[Sampler, Masks]] = OrderedDict()

    def sample(
        self, output: StepOutput, places: Sequence[int], rows: Sequence[SamplingRow]
    ) -> list[SampledToken | SampleFault]:
        """Choose a token for each row; ``places`` are theirs among the step's logits. See Sampler.sample."""
        if not output.others:
            logits = output.logits
            if len(places) != len(logits):
                logits = logits[torch.tensor(places, device=logits.device)]
            return self._base.sample(logits, rows)
        found: list[SampledToken | SampleFault | None] = [None] * len(rows)
        for size, numbers in self._by_size(output, places).items():
            if size == self._base.vocab_size:
                index = torch.tensor([places[number] for number in numbers], device=output.logits.device)
                logits, sampler = output.logits[index], self._base
            else:
                logits = torch.stack([output.others[places[number]] for number in numbers])
                sampler = self._of(size)[0]
            sampled = sampler.sample(logits, [rows[number] for number in numbers])
            for number, token in zip(numbers, sampled, strict=True):
                found[number] = token
        return [token for token in found if token is not None]

    def prompt_logprobs(
        self, output: StepOutput, first: int, next_token_ids: Sequence[int], top: int
    ) -> LogprobRows | SampleFault:
        """Report on a row's prompt tokens, whose logits begin at place ``first``. See Sampler.prompt_logprobs."""
        count = len(next_token_ids)
        if count and first in output.others:
            logits = torch.stack([output.others[first + number] for number in range(count)])
            return self._of(logits.shape[1])[0].prompt_logprobs(logits, next_token_ids, top)
        return self._base.prompt_logprobs(output.logits[first : first + count], next_token_ids, top)

    def fill(self, matchers: Sequence[Matcher]) -> tuple[Mapping[int, Words], dict[int, GrammarFault]]:
        """Return the masks, good until the next call, and the faults, both by number in ``matchers``."""
        sizes: dict[int, list[int]] = {}
        for number, matcher in enumerate(matchers):
            sizes.setdefault(matcher.vocab_size, []).append(number)
        words: dict[int, Words] = {}
        faults: dict[int, GrammarFault] = {}
        for size, numbers in sizes.items():
            masks = self._masks if size == self._base.vocab_size else self._of(size)[1]
            filled, wrong = masks.fill([matchers[number] for number in numbers])
            words.update({number: filled[i] for i, number in enumerate(numbers) if i not in wrong})
            faults.update({numbers[i]: fault for i, fault in wrong.items()})
        return words, faults

    def _by_size(self, output: StepOutput, places: Sequence[int]) -> dict[int, list[int]]:
        sizes: dict[int, list[int]] = {}
        for number, place in enumerate(places):
            own = output.others.get(place)
            size = self._base.vocab_size if own is None else len(own)
            sizes.setdefault(size, []).append(number)
        return sizes

    def _of(self, size: int) -> tuple[Sampler, Masks]:
        found = self._others.get(size)
        if found is None:
            found = self._others[size] = self._base.sized(size), Masks(size, self._threads)
        self._others.move_to_end(size)
        if len(self._others) > MOST_SIZES:
            self._others.popitem(last=False)
        return found

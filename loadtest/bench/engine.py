"""`manylora bench engine`: a closed loop on the engine itself, without HTTP, and where a step's time goes.

Formatting the events that a server would send is done and timed too, so that all of a step's work that is not a
kernel is counted. Needs torch, transformers, safetensors and numpy, nothing else.
"""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from manylora.loadtest.bench.step_times import StepLog, StepShares
from manylora.loadtest.bench.workload import Planned, Workload, token_prompt
from manylora.loadtest.material.engines import (
    EngineSizes,
    add_random_adapters,
    build_engine,
    torch_threads_kept,
)
from manylora.loadtest.material.random_model import ModelChoice, build_decoder
from manylora.server.engine.engine import Engine
from manylora.server.engine.request import FinishReason, GenerationRequest, SamplingParams, SequenceOutput


@dataclass(frozen=True, slots=True)
class EngineBench:
    """What to measure."""

    model: ModelChoice
    workload: Workload
    adapters: int
    """0: the base alone."""
    rank: int
    temperature: float = 0.0
    top_p: float = 1.0

    def sampling(self, number: int) -> SamplingParams:
        """Return how request ``number`` is sampled."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=number,
            ignore_eos=True,
            max_tokens=self.workload.output_tokens,
        )


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What came out, without the warm-up."""

    requests: int
    output_tokens: int
    seconds: float
    decode: StepShares
    """Steps in which every stream got one token and no prompt was computed."""
    every: StepShares

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second, prompts included in the time."""
        return self.output_tokens / self.seconds


def run_engine(bench: EngineBench) -> EngineResult:
    """Build the engine and run the workload. Raises RuntimeError if a request fails."""
    with torch_threads_kept():
        return _run(bench)


def _run(bench: EngineBench) -> EngineResult:
    torch.manual_seed(bench.workload.seed)
    work = bench.workload
    decoder = build_decoder(bench.model)
    context = work.input_tokens + work.output_tokens
    if context > decoder.config.max_position:
        raise ValueError(f"{context} tokens are more than the model's context, {decoder.config.max_position}")
    log = StepLog()
    sizes = EngineSizes(work.streams, context, bench.adapters * bench.rank)
    engine = build_engine(decoder, sizes, log)
    ids = add_random_adapters(engine, decoder, [bench.rank] * bench.adapters)
    models = ids or [0]
    warm, counted = work.warm_up(len(models), 2 * work.streams), work.plan(len(models))
    loop = _ClosedLoop(engine, models, decoder.config.vocab_size)
    # Short answers warm up as well as long ones.
    loop.run(replace(bench, workload=replace(work, output_tokens=min(8, work.output_tokens))), warm, log)
    log.clear()
    began = time.perf_counter()
    tokens = loop.run(bench, counted, log)
    seconds = time.perf_counter() - began
    engine.check_integrity()
    return EngineResult(len(counted), tokens, seconds, log.decode(work.streams), log.every())


class _ClosedLoop:
    """Keeps as many requests in the engine as there are streams."""

    def __init__(self, engine: Engine, models: list[int], vocab_size: int) -> None:
        self._engine = engine
        self._models = models
        self._vocab_size = vocab_size
        self._numbers = itertools.count()

    def run(self, bench: EngineBench, plan: list[Planned], log: StepLog) -> int:
        """Run all of ``plan``; return the tokens that came out."""
        coming = iter(plan)
        for planned in itertools.islice(coming, bench.workload.streams):
            self._submit(bench, planned)
        tokens = 0
        while len(self._engine.requests):
            began = time.perf_counter()
            self._engine.step()
            stepped = time.perf_counter()
            outputs = self._engine.requests.take_outputs()
            for event in sse_events(outputs):
                assert event
            log.step_ended(stepped - began, time.perf_counter() - stepped)
            tokens += self._take(outputs, bench, coming)
        return tokens

    def _take(self, outputs: list[SequenceOutput], bench: EngineBench, coming: Iterator[Planned]) -> int:
        for output in outputs:
            if output.finish_reason is FinishReason.FAILED:
                raise RuntimeError(f"a request failed: {output.error}") from output.error
            if output.finish_reason is not None:
                following = next(coming, None)
                if following is not None:
                    self._submit(bench, following)
        return sum(len(output.token_ids) for output in outputs)

    def _submit(self, bench: EngineBench, planned: Planned) -> None:
        work, number = bench.workload, next(self._numbers)
        adapter_id = self._models[planned.model]
        request = GenerationRequest(
            request_id=f"cmpl-{number:032x}",
            prompt_token_ids=token_prompt(planned.prompt, work.input_tokens, self._vocab_size, work.seed),
            sampling=bench.sampling(number),
            adapters=((adapter_id, 1.0),) if adapter_id else (),
            adapter_label=f"adapter-{adapter_id}",
            arrival_time=time.monotonic(),
        )
        self._engine.add_request(request)


def sse_events(outputs: list[SequenceOutput]) -> Iterator[bytes]:
    """Yield the event of each output that a server sends for a streamed completion: what it costs is measured."""
    for output in outputs:
        finish = None if output.finish_reason is None else output.finish_reason.value
        chunk = {
            "id": output.request_id,
            "object": "text_completion",
            "created": 1_700_000_000,
            "model": "adapter",
            "system_fingerprint": None,
            "choices": [
                {
                    "index": output.index,
                    "text": output.text,
                    "logprobs": None,
                    "finish_reason": finish,
                    "stop_reason": output.stop_reason,
                }
            ],
            "usage": None,
        }
        yield f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()

"""Holds what plain torch does on a GPU in a quicker way to what it does without: asked at load, before it is trusted.

Drivers, torch and cuBLAS differ from machine to machine, and a wrong answer looks like an answer. So a small decoder of
noise runs by torch's own kernels for RMSNorm and attention and without them; then its decode steps recorded and issued
op by op. What is off, or is refused, isn't used, and a warning says so.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.server.kernels.check import (
    BLOCK,
    MODULES,
    RANK,
    SHAPE,
    adapter_of_noise,
    model_of_noise,
    step_of_noise,
)
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.plain.decode_steps import Call, Record
from manylora.server.kernels.step import RankRange, WeightedAdapters

NEAR = {2: 0.03, 4: 1e-4}
"""How far logits by torch's own kernels may be off those without, relative, by the bytes of a number: where those are
two, what is rounded once by the one way is rounded on its way too by the other."""
PROMPTS = (40, 1, 9)
"""Tokens of the sequences before they decode."""
ARENAS = (4 * RANK, 300)
"""Rank rows: few are multiplied as they are, of many those in use are gathered."""
FIRST = dict.fromkeys(MODULES, RankRange(RANK - 2, RANK + 2))
SECOND = dict.fromkeys(MODULES, RankRange(2 * RANK, RANK))
"""The first scales and shifts outputs too."""
BASE: WeightedAdapters = ()
ONE: WeightedAdapters = ((FIRST, 1.0),)
TWO: WeightedAdapters = ((SECOND, 1.0),)
BOTH: WeightedAdapters = ((FIRST, 0.5), (SECOND, 0.25))
DECODES: Sequence[tuple[WeightedAdapters, ...]] = (
    (ONE, BASE, TWO),
    (ONE, BASE, TWO),
    (ONE, BASE),
    (TWO, ONE, BASE),
    (BASE, TWO),
    (BOTH, ONE, TWO),
    (TWO, ONE, BOTH),
    (BASE, BASE, BASE),
    (BASE, BASE),
    (BASE, BASE, BASE),
)
"""What the first rows of each step use: rows come and go, adapters change places, and each form comes twice."""
REPLACED = 3
"""The step before which the second adapter makes room for another one."""
log = logging.getLogger(__name__)


def sound_plain(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None, record: Record | None
) -> PlainBackend:
    """Return plain torch for a GPU, as quick as it computes there what it should; warn of what isn't used."""
    wrong = fused_fault(device, dtype, kv_dtype)
    if wrong is not None:
        log.warning("torch's own kernels for RMSNorm and attention aren't used on %s: %s", device, wrong)
    fused = wrong is None
    if record is not None:
        wrong = recording_fault(device, dtype, kv_dtype, record, fused=fused)
        if wrong is not None:
            log.warning("decode steps are issued op by op on %s: %s", device, wrong)
            record = None
    # What was tried is in circles, and is better gone before a server's own work is recorded.
    gc.collect()
    return PlainBackend(device, dtype, kv_dtype, record, fixed_decodes=True, fused=fused)


def fused_fault(device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None) -> str | None:
    """Return what torch's own kernels for RMSNorm and attention compute otherwise than ops do, or None."""

    def found() -> str | None:
        ours, theirs = (
            _answers(PlainBackend(device, dtype, kv_dtype, fixed_decodes=True, fused=fused))
            for fused in (True, False)
        )
        near = NEAR[dtype.itemsize]
        if not bool(ours.finite.all()):
            return "sound numbers are told to be none"
        off = float((ours.logits - theirs.logits).norm() / theirs.logits.norm())
        # Written so that NaN is wrong.
        return None if off <= near else f"logits are {off:.2g} off, of which {near} are allowed"

    return _tried(found)


def recording_fault(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None, record: Record, *, fused: bool
) -> str | None:
    """Return what decode steps that are recorded compute otherwise than op by op, to the bit, or None."""

    def found() -> str | None:
        watched = _Watched(record)
        ours, theirs = (
            _answers(PlainBackend(device, dtype, kv_dtype, recorder, fixed_decodes=True, fused=fused))
            for recorder in (watched, None)
        )
        if watched.refused is not None:
            return f"they can't be recorded: {watched.refused}"
        if not watched.played:
            return "none was played back"
        same = torch.equal(ours.logits, theirs.logits) and torch.equal(ours.finite, theirs.finite)
        return None if same else "recorded ones give other logits"

    return _tried(found)


class _Watched:
    """A recorder that is asked what became of it."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self.refused: Exception | None = None
        self.played = 0

    def __call__(self, call: Call) -> Call:
        """Record ``call``; once that was refused, give it back."""
        if self.refused is not None:
            return call
        try:
            play = self._record(call)
        except Exception as error:  # whatever it is: it mustn't keep a server from starting
            self.refused = error
            return call

        def again() -> None:
            try:
                play()
            except Exception as error:
                self.refused = error
                call()
            self.played += 1

        return again


@dataclass(frozen=True, slots=True)
class _Answers:
    """Of all tokens of all steps, on the host."""

    logits: Tensor
    finite: Tensor


def _tried(found: Callable[[], str | None]) -> str | None:
    """Return what was found wrong; an error is wrong too."""
    try:
        with torch.inference_mode():
            return found()
    except Exception as error:  # whatever it is: it mustn't keep a server from starting
        return f"{type(error).__name__}: {error}"


def _answers(backend: PlainBackend) -> _Answers:
    """Bring prompts in and decode them, in arenas of both kinds."""
    found = [each for rows in ARENAS for each in _run(backend, rows)]
    return _Answers(*(torch.cat(each) for each in zip(*found, strict=True)))


def _run(backend: PlainBackend, rows: int) -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(0)
    model = model_of_noise(backend, noise)
    kv, arena = backend.new_kv(SHAPE, 3 * len(PROMPTS), BLOCK), backend.new_arena(SHAPE, rows)
    arena.write(FIRST, adapter_of_noise(noise, outputs=True))
    arena.write(SECOND, adapter_of_noise(noise))
    computed, found = [0] * len(PROMPTS), []
    for number, uses in enumerate(((ONE, BASE, TWO), *DECODES)):
        if number == REPLACED:
            arena.write(SECOND, adapter_of_noise(noise))
        lengths = [1 if number else PROMPTS[row] for row in range(len(uses))]
        batch = step_of_noise(computed[: len(uses)], lengths, uses)
        plan = backend.begin_step(model, batch, kv, arena)
        output = backend.collect(backend.launch(plan, batch.logits_rows, None))
        # Copies: the next step writes where this one did.
        found.append((output.logits.to("cpu", copy=True), output.finite.to("cpu", copy=True)))
        for row, length in enumerate(lengths):
            computed[row] += length
    return found

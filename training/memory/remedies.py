"""What gets a run into a budget, the smallest change of its results first.

    1. a smaller evaluation batch: the same loss
    2. a smaller micro-batch with as much more accumulation: the same gradients, a little slower
    3. gradient checkpointing: the same gradients, about a third more time
    4. Q-LoRA: the base in 4 bits, slower, and a little off what it was
    5. double quantisation: NF4's scales in 8 bits, a little further off
    6. examples cut: data is lost

Each of the first five counts as dearer than all before it together: 2 with 3 is tried before 4. Examples are cut last
and least: where nothing else gets the run in, at the greatest length that anything gets in.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import compress, product

from manylora.training.memory.plan import GIB, plan
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape

SHORTEST = 64
"""Tokens below which a sequence isn't cut: no example would be whole."""
STEP = 8
"""Lengths that are tried are multiples of this many tokens."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """Changes that together get a run in."""

    run: RunShape
    """The run as changed."""
    changes: tuple[str, ...]
    """Their names: eval_batch, batch, checkpointing, qlora, double_quant, seq."""
    total_gib: float
    flags: str
    """For `manylora train`."""
    sentence: str


def remedies(
    model: ModelShape,
    run: RunShape,
    budget_bytes: int,
    recipe: str | None = None,
    shortest: int | None = SHORTEST,
) -> tuple[Remedy, ...]:
    """Return every set of changes that fits and of which no part would do, the smallest change of results first.

    Examples are cut to no fewer tokens than ``shortest``; None: not at all. Empty when the run fits as it is, or when
    nothing gets it in.
    """
    if _gib(model, run, recipe) * GIB <= budget_bytes:
        return ()
    found = _at_this_length(model, run, run, budget_bytes, recipe)
    if found or shortest is None:
        return found
    length = _longest_that_fits(model, run, budget_bytes, recipe, shortest)
    return () if length is None else _at_this_length(model, run, _cut(run, length), budget_bytes, recipe)


def smallest(model: ModelShape, run: RunShape, shortest: int | None = SHORTEST) -> RunShape:
    """Return the run with the changes that take the least memory."""
    cut = run if shortest is None else _cut(run, min(run.longest, shortest))
    return min(_extremes(model, cut), key=lambda each: plan(model, each).total_gib)


def _longest_that_fits(
    model: ModelShape, run: RunShape, budget_bytes: int, recipe: str | None, shortest: int
) -> int | None:
    """Return the greatest length at which any set of changes gets the run in."""

    def fits(length: int) -> bool:
        variants = _extremes(model, _cut(run, length))
        return any(_gib(model, each, recipe) * GIB <= budget_bytes for each in variants)

    # What fits does so with shorter examples too, so halving finds it: a run may be as long as anybody writes.
    lengths = range(-(-shortest // STEP) * STEP, run.longest, STEP)
    longer = bisect_left(lengths, True, key=lambda length: not fits(length))
    if longer > 0:
        return lengths[longer - 1]
    return shortest if shortest < run.longest and fits(shortest) else None


def _extremes(model: ModelShape, run: RunShape) -> Iterator[RunShape]:
    """Yield the run with each change either not made or made as far as it goes."""
    stored = model.quantization is not None
    for batch, eval_batch, checkpointing, method, double_quant in product(
        {run.batch, 1},
        {run.eval_batch, 1},
        {run.gradient_checkpointing, True},
        {run.method} if stored else {run.method, "qlora"},
        {run.double_quant} if stored else {run.double_quant, True},
    ):
        yield replace(
            run,
            batch=batch,
            accumulation=run.global_batch // batch,
            eval_batch=eval_batch,
            gradient_checkpointing=checkpointing,
            method=method,
            double_quant=double_quant if method == "qlora" else run.double_quant,
        )


_CHANGES = ("eval_batch", "batch", "checkpointing", "qlora", "double_quant")


def _at_this_length(
    model: ModelShape, before: RunShape, run: RunShape, budget_bytes: int, recipe: str | None
) -> tuple[Remedy, ...]:
    """Return the changes that get ``run`` in, which is ``before`` with its examples cut or not."""
    cut = ("seq",) if run.longest < before.longest else ()
    found: list[Remedy] = []
    for names in ((), *_by_cost()):
        if any(set(each.changes) - {"seq"} <= set(names) for each in found):
            continue
        for changed in _variants(model, run, names):
            total = _gib(model, changed, recipe)
            if total * GIB <= budget_bytes:
                flags, sentence = _in_words(before, changed)
                found.append(Remedy(changed, (*names, *cut), total, flags, sentence))
                break
    return tuple(found)


def _by_cost() -> Iterator[tuple[str, ...]]:
    """Yield sets of changes, such that each change comes after all sets of cheaper ones."""
    for chosen in product((False, True), repeat=len(_CHANGES)):
        if any(chosen):
            yield tuple(compress(_CHANGES, reversed(chosen)))


def _variants(model: ModelShape, run: RunShape, names: tuple[str, ...]) -> Iterator[RunShape]:
    """Yield the run with these changes, the mildest first; nothing when one of them is made or can't be made."""
    stored = model.quantization is not None
    scales = run.method == "qlora" or "qlora" in names
    done = {
        "checkpointing": run.gradient_checkpointing,
        "qlora": run.method == "qlora" or stored,
        "double_quant": run.double_quant or stored or not scales,
    }
    if any(done.get(name, False) for name in names):
        return
    if "checkpointing" in names:
        run = replace(run, gradient_checkpointing=True)
    if "qlora" in names:
        run = replace(run, method="qlora")
    if "double_quant" in names:
        run = replace(run, double_quant=True)
    for batch in _smaller_batches(run.batch, run.global_batch) if "batch" in names else [run.batch]:
        for eval_batch in _smaller_evaluations(run) if "eval_batch" in names else [run.eval_batch]:
            yield replace(run, batch=batch, accumulation=run.global_batch // batch, eval_batch=eval_batch)


@lru_cache(maxsize=8)
def _smaller_batches(batch: int, whole: int) -> tuple[int, ...]:
    """Return micro-batches below ``batch``, largest first, that leave the global batch whole."""
    return tuple(each for each in range(batch - 1, 0, -1) if whole % each == 0)


def _smaller_evaluations(run: RunShape) -> list[int]:
    """Return evaluation batches, largest first; none where nothing is held out."""
    halves = [run.eval_batch >> times for times in range(1, run.eval_batch.bit_length())]
    return halves if run.eval_seq else []


def _cut(run: RunShape, length: int) -> RunShape:
    """Return the run with its examples cut at a length, those that are held out too."""
    return replace(run, seq=min(run.seq, length), eval_seq=min(run.eval_seq, length))


def _gib(model: ModelShape, run: RunShape, recipe: str | None) -> float:
    return plan(model, run, recipe).total_gib


def _in_words(before: RunShape, after: RunShape) -> tuple[str, str]:
    flags: list[str] = []
    sentences: list[str] = []
    if after.eval_batch != before.eval_batch:
        flags.append(f"--per_device_eval_batch_size {after.eval_batch}")
        sentences.append(f"evaluation batch {before.eval_batch} → {after.eval_batch} (the same loss)")
    if after.batch != before.batch:
        flags.append(f"--per_device_train_batch_size {after.batch}")
        flags.append(f"--gradient_accumulation_steps {after.accumulation}")
        sentences.append(
            f"micro-batch {before.batch} → {after.batch}, accumulation {before.accumulation} → {after.accumulation} "
            f"(the global batch stays {after.global_batch})"
        )
    if after.gradient_checkpointing != before.gradient_checkpointing:
        flags.append("--gradient_checkpointing")
        sentences.append("gradient checkpointing on (about a third more time)")
    if after.method != before.method:
        flags.append("--q_lora")
        sentences.append("the base in 4 bits (Q-LoRA)")
    if after.double_quant != before.double_quant:
        flags.append("--double_quant")
        sentences.append("NF4's scales quantised too (double quantisation)")
    if after.longest != before.longest:
        flags.append(f"--model_max_length {after.longest}")
        sentences.append(f"examples cut at {after.longest} tokens instead of {before.longest}")
    return " ".join(flags), "; ".join(sentences)

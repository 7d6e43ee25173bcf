"""What gets a run into a budget, cheapest first.

Four changes, in the order of what they cost:

    1. a smaller micro-batch with as much more accumulation: the same gradients, a little slower
    2. gradient checkpointing: the same gradients, about a third more time
    3. Q-LoRA: the base in 4 bits, slower, and a little off what it was
    4. shorter sequences: data is cut off

One change beats two, except that each change costs more than all before it together: 1 + 2 is tried before 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import compress, product

from manylora.training.memory.plan import GIB, plan
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape

SHORTEST = 64
"""Tokens below which a sequence isn't cut: no example would be whole."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """Changes that together get a run in."""

    run: RunShape
    """The run as changed."""
    changes: tuple[str, ...]
    """Their names: batch, checkpointing, qlora, seq."""
    total_gib: float
    flags: str
    """For `manylora train`."""
    sentence: str


def remedies(
    model: ModelShape, run: RunShape, budget_bytes: int, recipe: str | None = None
) -> tuple[Remedy, ...]:
    """Return every set of changes that fits and of which no part would do, cheapest first.

    Empty when the run fits as it is, or when nothing gets it in.
    """
    if _gib(model, run, recipe) * GIB <= budget_bytes:
        return ()
    found: list[Remedy] = []
    for names in _by_cost():
        if any(set(each.changes) <= set(names) for each in found):
            continue
        for changed in _variants(model, run, names):
            total = _gib(model, changed, recipe)
            if total * GIB <= budget_bytes:
                flags, sentence = _in_words(run, changed)
                found.append(Remedy(changed, names, total, flags, sentence))
                break
    return tuple(found)


def smallest(model: ModelShape, run: RunShape) -> RunShape:
    """Return the run with every change made as far as it goes."""
    return replace(
        run,
        batch=1,
        accumulation=run.global_batch,
        gradient_checkpointing=True,
        method="qlora",
        seq=min((run.seq, *_halves(run.seq))),
    )


_CHANGES = ("batch", "checkpointing", "qlora", "seq")


def _by_cost() -> Iterator[tuple[str, ...]]:
    """Yield sets of changes, such that each change comes after all sets of cheaper ones."""
    for chosen in product((False, True), repeat=len(_CHANGES)):
        if any(chosen):
            yield tuple(compress(_CHANGES, reversed(chosen)))


def _variants(model: ModelShape, run: RunShape, names: tuple[str, ...]) -> Iterator[RunShape]:
    """Yield the run with these changes, the mildest first; nothing when one of them is already made."""
    done = {
        "checkpointing": run.gradient_checkpointing,
        "qlora": run.method == "qlora" or model.quantization is not None,
    }
    if any(done.get(name, False) for name in names):
        return
    if "checkpointing" in names:
        run = replace(run, gradient_checkpointing=True)
    if "qlora" in names:
        run = replace(run, method="qlora")
    lengths = _halves(run.seq) if "seq" in names else [run.seq]
    for seq in lengths:
        for batch in _smaller_batches(run) if "batch" in names else [run.batch]:
            yield replace(run, seq=seq, batch=batch, accumulation=run.global_batch // batch)


def _smaller_batches(run: RunShape) -> list[int]:
    """Return micro-batches, largest first, that leave the global batch whole."""
    return [batch for batch in range(run.batch - 1, 0, -1) if run.global_batch % batch == 0]


def _halves(seq: int) -> list[int]:
    """Return ¾, ½, ⅜, ¼ … of a length, down to the shortest that makes sense."""
    lengths = sorted({seq * share // (1 << k) for k in range(2, 16) for share in (2, 3)}, reverse=True)
    return [length for length in lengths if SHORTEST <= length < seq]


def _gib(model: ModelShape, run: RunShape, recipe: str | None) -> float:
    return plan(model, run, recipe).total_gib


def _in_words(before: RunShape, after: RunShape) -> tuple[str, str]:
    flags: list[str] = []
    sentences: list[str] = []
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
    if after.seq != before.seq:
        flags.append(f"--model_max_length {after.seq}")
        sentences.append(f"examples cut at {after.seq} tokens instead of {before.seq}")
    return " ".join(flags), "; ".join(sentences)

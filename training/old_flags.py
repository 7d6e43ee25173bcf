"""Flags that transformers renamed or dropped, as commands from before still write them."""

from collections.abc import Sequence

from manylora.training.errors import InvalidArgument
from manylora.training.flags import Flag, last_of

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "revision": "model_revision",
}
SINCE_ALWAYS = {
    "save_safetensors": "adapters are written as safetensors only",
    "jit_mode_eval": "transformers dropped it",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR, which transformers reads in its place",
}
"""Dropped flags with one value or none, and what happens without them."""
SAMPLING = "train_sampling_strategy"


def modernise(flags: Sequence[Flag]) -> tuple[list[Flag], list[str]]:
    """Return ``flags`` with today's names, and a sentence for each that says nothing any more.

    Raises InvalidArgument for an old flag that is given what it never took.
    """
    found: list[Flag] = []
    notes: list[str] = []
    for flag in flags:
        if flag.name in SINCE_ALWAYS:
            if flag.values:
                flag.value()  # refuses a second one, which nothing else would read
            notes.append(f"--{flag.name} is not used: {SINCE_ALWAYS[flag.name]}")
        elif flag.name != "group_by_length":
            found.append(Flag(RENAMED.get(flag.name, flag.name), flag.values))
    by_length = last_of(flags, "group_by_length")
    if by_length is not None and by_length.switch():
        found.append(Flag(SAMPLING, ("group_by_length",)))
    return _settle_warmup(found, notes), notes


def _settle_warmup(flags: list[Flag], notes: list[str]) -> list[Flag]:
    """Give --warmup_ratio today's name, under which a number below 1 is a share.

    As it always was, steps win over a share, unless they are 0, which was their default.
    """
    ratio, steps = last_of(flags, "warmup_ratio"), last_of(flags, "warmup_steps")
    if ratio is None:
        return flags
    rest = [flag for flag in flags if flag.name != "warmup_ratio"]
    share = _number(ratio)
    if not 0 <= share < 1:
        raise InvalidArgument(f"--warmup_ratio {share:g}: expected a share from 0 up to, but not, 1")
    if steps is not None and _number(steps):
        if share:
            notes.append(f"--warmup_ratio {share:g} is not used: --warmup_steps {steps.value()} wins over it")
        return rest
    return [*(flag for flag in rest if flag.name != "warmup_steps"), Flag("warmup_steps", ratio.values)]


def _number(flag: Flag) -> float:
    try:
        return float(flag.value())
    except ValueError:
        raise InvalidArgument(f"--{flag.name} {flag.value()}: expected a number") from None

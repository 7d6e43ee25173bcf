"""Flags that transformers renamed or dropped, as commands from before still write them."""

from collections.abc import Sequence

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",  # a number below 1 is a share there now
    "revision": "model_revision",
}
SINCE_ALWAYS = {
    "save_safetensors": "adapters are written as safetensors only",
    "jit_mode_eval": "transformers dropped it",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR, which transformers reads in its place",
}
"""Dropped flags that need a value, and what happens without them."""


def modernise(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return ``argv`` with today's names, and a sentence for each flag that says nothing any more."""
    found: list[str] = []
    notes: list[str] = []
    words = iter(_split_equals(argv))
    for word in words:
        name = flag_name(word)
        if name in RENAMED:
            found.append(f"--{RENAMED[name]}")
        elif name in SINCE_ALWAYS:
            next(words, None)
            notes.append(f"--{name} is not used: {SINCE_ALWAYS[name]}")
        elif name == "group_by_length":
            value = next(words, "True")
            if value.lower() in ("true", "1", "yes"):
                found += ["--train_sampling_strategy", "group_by_length"]
        else:
            found.append(word)
    return found, notes


def flag_name(word: str) -> str:
    """Return the flag that ``word`` is, with underscores, or an empty string for a value."""
    return word[2:].replace("-", "_") if word.startswith("--") and len(word) > 2 else ""


def _split_equals(argv: Sequence[str]) -> list[str]:
    words: list[str] = []
    for word in argv:
        if word.startswith("--") and "=" in word:
            words += word.split("=", 1)
        else:
            words.append(word)
    return words

"""What a run asks for, as far as memory goes. Sizes of the model are in shape.py, bytes in plan.py."""

import re
from dataclasses import dataclass

from manylora.quant.nf4 import DOUBLE_QUANT
from manylora.training.errors import InvalidArgument

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a value in the dtype that a run computes in."""
METHODS = ("lora", "qlora")
MOST_ROWS = 1_000_000
"""Of a batch, and of its pieces. Above it a number is a slip, and all smaller batches are too many to try."""
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True, slots=True)
class RunShape:
    """One device's share of a run.

    Raises InvalidArgument when a size isn't above 0 or a name isn't known.
    """

    method: str = "lora"
    """lora: the base as it is stored, or in 16 bits. qlora: in 4 bits."""
    seq: int = 1024
    """Tokens of the longest example; a packed row's length when examples are packed."""
    batch: int = 1
    """Rows of a micro-batch."""
    accumulation: int = 1
    """Micro-batches of an optimiser step."""
    rank: int = 64
    """The rank at the end of training: with a growing rank, the last one."""
    targets: tuple[str, ...] = ()
    """Names of adapted matrices, or their paths; none means all of a layer."""
    gradient_checkpointing: bool = False
    dtype: str = "bf16"
    optim: str = "adamw_torch"
    packing: bool = False
    """Whether rows hold several examples, which takes a mask that says who may see whom."""
    train_embeddings: bool = False
    """Whether the embedding is trained whole (modules_to_save), and the head too unless ``whole`` says otherwise."""
    whole: int | None = None
    """Values that are trained beside LoRA's: of modules_to_save, biases and new tokens. None: as train_embeddings has
    it."""
    dropout: float = 0.05
    trained_share: float = 1.0
    """Share of tokens with a loss. Logits are made for these only; 1.0 is the worst case."""
    device: str = "cuda"
    double_quant: bool = DOUBLE_QUANT
    """Of NF4: whether the scales are quantised too."""
    rank_pattern: tuple[tuple[str, int], ...] = ()
    """PEFT's: matrices whose path ends with a key, or matches it, and their ranks."""
    use_dora: bool = False
    starts_from_base: bool = False
    """Whether the factors start as part of the weight (PiSSA, OLoRA), which stays frozen beside them."""
    eval_seq: int = 0
    """Tokens of the longest held-out example; 0: nothing is held out."""
    eval_batch: int = 8
    """Rows of an evaluation batch."""
    answer_tokens: int = 0
    """With --eval_answers: tokens of the longest prompt and its answer, which the served base holds; 0: no answers."""
    answers: int = 64
    """How many are asked for."""

    def __post_init__(self) -> None:
        for name in ("seq", "batch", "accumulation", "rank", "eval_batch", "answers"):
            if getattr(self, name) < 1:
                raise InvalidArgument(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected a whole number above 0."
                )
        for name in ("batch", "accumulation", "eval_batch"):
            if getattr(self, name) > MOST_ROWS:
                raise InvalidArgument(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at most {MOST_ROWS:,}."
                )
        for name in ("eval_seq", "answer_tokens"):
            if getattr(self, name) < 0:
                raise InvalidArgument(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected a number of tokens, or 0 for none."
                )
        for name, known in (("method", METHODS), ("dtype", tuple(DTYPES)), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise InvalidArgument(f"--{name} is {getattr(self, name)!r}, expected {' or '.join(known)}.")
        if not 0 < self.trained_share <= 1:
            raise InvalidArgument(
                f"the trained share is {self.trained_share}, expected above 0 and at most 1."
            )
        optimizer_bytes(self.optim)
        _check_pattern(self.rank_pattern)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.seq * self.batch

    @property
    def longest(self) -> int:
        """Tokens of the longest example, whether it is trained on or held out."""
        return max(self.seq, self.eval_seq)

    @property
    def global_batch(self) -> int:
        """Rows of an optimiser step on this device."""
        return self.batch * self.accumulation


def _check_pattern(pattern: tuple[tuple[str, int], ...]) -> None:
    for key, rank in pattern:
        if rank < 1:
            raise InvalidArgument(f"the rank pattern says {key}={rank}, expected a whole number above 0.")
        try:
            re.compile(key)
        except re.error as error:
            raise InvalidArgument(f"the rank pattern's {key!r} is no regular expression: {error}.") from None


_STATE_BYTES = {
    "adamw": 8.0,
    "adam": 8.0,
    "lion": 4.0,
    "rmsprop": 4.0,
    "adagrad": 4.0,
    "sgd": 0.0,
    "adafactor": 0.1,
}


def optimizer_bytes(optim: str) -> float:
    """Return the bytes of optimiser state for one trained fp32 value.

    Two fp32 moments for Adam, one for Lion, RMSprop and Adagrad, none for plain SGD; the 8-bit kinds hold a byte a
    moment and one fp32 scale for 256 of them (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization",
    section 2). Adafactor holds a row and a column, a small share. Raises InvalidArgument for a name that transformers
    doesn't know either.
    """
    name = optim.removeprefix("paged_")
    for family, state in _STATE_BYTES.items():
        if name == family or name.startswith(f"{family}_"):
            eight_bit = name.endswith(("8bit", "4bit")) or optim.startswith("adamw_bnb")
            return state / 4 * (1 + 4 / 256) if eight_bit else state
    raise InvalidArgument(
        f"--optim is {optim!r}, expected one of transformers' names, such as adamw_torch or adamw_8bit."
    )

"""What libraries say to their own developers stays out of a run's output."""

import logging
import warnings

from manylora.training.bases.quiet import quiet_bitsandbytes

OF_NO_USE = (
    # A base's configs lack a pad token: the tokenizer's is used, as everywhere here.
    "The tokenizer has new PAD/BOS/EOS tokens",
    # A resumed run goes by its own flags (training/loop/resuming.py).
    "Warning: The following arguments do not match the ones in the `trainer_state.json`",
    # It is looked for where the run's directory is now; what is gone is said (training/loop/resuming.py).
    "The best checkpoint ",
    # --fsdp full_shard is what its users write, and is taken.
    "Passing `fsdp` as a string is deprecated",
)
"""How sentences of transformers begin that no user can act on."""


def quiet_libraries() -> None:
    """Call it before transformers is imported."""
    quiet_bitsandbytes()
    # It announces new names to callers that are other libraries.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("trainer", "trainer_utils", "training_args"):
        logging.getLogger(f"transformers.{name}").addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(OF_NO_USE)

"""What libraries say to their own developers stays out of a run's output."""

import logging
import warnings


def quiet_libraries() -> None:
    """Call it before transformers is imported."""
    # It looks for an optional kernel on a hub, and says that it does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It announces new names to callers that are other libraries.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

"""What libraries say to their own developers stays out of a run's output."""

import warnings

from manylora.training.bases.quiet import quiet_bitsandbytes


def quiet_libraries() -> None:
    """Call it before transformers is imported."""
    quiet_bitsandbytes()
    # It announces new names to callers that are other libraries.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

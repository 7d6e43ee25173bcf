"""What tests of the commands leave as they found it."""

import logging
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Give the root logger, structlog and the warnings their former ways back."""
    root, config = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers, root.level
    # Whoever left it on has had warnings' own hook put back since: turned on again it would do nothing.
    logging.captureWarnings(False)
    yield
    root.handlers, root.level = handlers, level
    structlog.configure(**config)
    logging.captureWarnings(False)

"""A registry in a directory of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora.adapters.registry import AdapterRegistry


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the registry's file is, or will be."""
    return tmp_path / "adapters.db"


@pytest.fixture
def registry(path: Path) -> Iterator[AdapterRegistry]:
    """One that is open, for a base named "base"."""
    with AdapterRegistry(path, reserved=["base"]) as opened:
        yield opened

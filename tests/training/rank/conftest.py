"""One random base in every format, written once, and peft's one warning that every model of it meets."""

from pathlib import Path

import pytest

from tests.training.bases.making import write_awq, write_dense, write_gptq

DEPRECATED_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let peft ask transformers 5 for a name that transformers is about to drop."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(DEPRECATED_NAME))


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("bases")
    dense = write_dense(parent / "dense")
    return {
        "dense": dense,
        "nf4": dense,
        "gptq": write_gptq(dense, parent / "gptq"),
        "awq": write_awq(dense, parent / "awq"),
    }

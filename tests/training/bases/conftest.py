"""One random base in every format, written once."""

from pathlib import Path

import pytest

from tests.training.bases.making import write_awq, write_dense, write_gptq


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("bases") / "dense")


@pytest.fixture(scope="session")
def directories(dense_dir: Path) -> dict[str, Path]:
    parent = dense_dir.parent
    return {
        "dense": dense_dir,
        "nf4": dense_dir,
        "gptq": write_gptq(dense_dir, parent / "gptq"),
        "gptq8": write_gptq(dense_dir, parent / "gptq8", bits=8),
        "gptq-reordered": write_gptq(dense_dir, parent / "gptq-reordered", desc_act=True),
        "awq": write_awq(dense_dir, parent / "awq"),
    }

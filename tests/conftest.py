"""What every test gets: one torch thread, since the suite runs on as many processes as there are cores."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)

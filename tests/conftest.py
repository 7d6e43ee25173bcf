"""What every test gets: one torch thread, since the suite runs on as many processes as there are cores."""

import pytest
import torch

from manylora.server.kernels.plain.invariance import hold_mkl

hold_mkl()  # before the first product of any test, as in a server


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)

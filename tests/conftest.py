"""What every test gets: one torch thread, since the suite runs on as many processes as there are cores, and no
certificates."""

import os
from pathlib import Path

import pytest
import torch

from manylora.server.kernels.plain.invariance import hold_mkl

hold_mkl()  # before the first product of any test, as in a server

# Each client of httpx reads all certificates of the system, for 20 to 40 ms, unless they lie in a folder, where they
# would be looked up when needed. All that tests ask is on this machine, and none of it has one.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)

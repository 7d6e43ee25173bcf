"""The engine's benchmark: what it leaves behind."""

import torch

from manylora.loadtest.bench.engine import EngineBench, run_engine
from manylora.loadtest.bench.popularity import Popularity
from manylora.loadtest.bench.workload import Workload
from manylora.loadtest.material.random_model import ModelChoice


def test_an_engine_leaves_torch_its_threads_so_that_the_next_ones_kernels_have_as_many() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        work = Workload(1, Popularity.parse("uniform"), 4, 2, 1, 0, 0)
        run_engine(EngineBench(ModelChoice("tiny", "nf4"), work, 0, 4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

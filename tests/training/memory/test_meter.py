"""Measuring a peak on a CPU, and sizes as people write them."""

import pytest
import torch

from manylora.training.errors import InvalidArgument
from manylora.training.memory.meter import PeakMeter
from manylora.training.memory.sizes import parse_bytes

MIB = 1 << 20


def test_the_peak_is_what_was_in_use_at_most_since_the_beginning() -> None:
    with PeakMeter(torch.device("cpu")) as meter:
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        del block
        with_block = meter.peak_bytes
        assert with_block - meter.start_bytes >= 60 * MIB
    meter.reset()
    assert meter.peak_bytes <= with_block - 50 * MIB
    assert meter.peak_gib == pytest.approx(meter.peak_bytes / (1 << 30))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("24G", 24 << 30),
        ("24", 24 << 30),
        ("80GB", 80 * 10**9),
        (" 512 MiB ", 512 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "big", "0GiB", "-1G", "24 parsecs"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidArgument, match="24GiB"):
        parse_bytes(text)

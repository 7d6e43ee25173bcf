"""The KV cache: what it holds belongs to one sequence alone, and what is not finite is told."""

from pathlib import Path

import pytest
import torch

from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.plain.kv_cache import PlainKVCache, bytes_per_block
from tests.server.model.models import save_model
from tests.server.model.steps import CPU, Stream, all_logits, load, step


@pytest.mark.parametrize("family", ["qwen2", "qwen2-window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_a_cache_held_before_changes_no_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Chunks and decodes in a cache full of NaN, the null block included."""
    save_model(family, tmp_path)
    found = []
    for rest in (0.0, torch.nan):
        floats = torch.float32 if dtype == torch.int8 else dtype
        model = load(tmp_path, backend=PlainBackend(CPU, floats, dtype))
        assert isinstance(model.kv, PlainKVCache)
        for rows in (each for layer in model.kv.layers for each in layer):
            (rows.data if rows.scales is None else rows.scales).fill_(rest)
        streams = [Stream(number, list(range(80))) for number in range(3)]
        for counts in ((70, 3, 1), (1, 30, 1), (9, 47, 1)):
            step(model, list(zip(streams, counts, strict=True)))
        found.append([all_logits(stream) for stream in streams])
    for clean, spoiled in zip(*found, strict=True):
        assert torch.equal(clean, spoiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_slots_that_are_not_finite_in_any_layer_are_told(
    dtype: torch.dtype, poison: float, tmp_path: Path
) -> None:
    save_model("qwen2", tmp_path)
    config = load(tmp_path, streams=1).decoder.config
    kv = PlainKVCache(config.shape, 4, 4, dtype, CPU)
    largest = torch.finfo(dtype).max
    for half in range(2):
        for layer in range(config.num_layers):
            slot = 1 + 2 * layer + half
            kv.layers[layer][half].data[slot] = largest
            kv.layers[layer][half].data[slot, -1, -1] = poison
    kv.layers[0][0].data[0], kv.layers[-1][1].data[0] = largest, -largest
    slots = torch.tensor([19, 0, *range(1, 1 + 2 * config.num_layers)])
    assert kv.finite(slots).tolist() == [True, True, *[False] * (2 * config.num_layers)]


def test_the_null_block_is_beside_those_that_are_given_out(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    config = load(tmp_path, streams=1).decoder.config
    kv = PlainKVCache(config.shape, 4, 8, torch.float32, CPU)
    assert kv.layers[0][0].data.shape[0] == 5 * 8
    assert kv.nbytes == 5 * bytes_per_block(config.shape, 8, torch.float32)

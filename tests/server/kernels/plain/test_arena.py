"""The rank arena: rows that change hands keep nothing of their last owner."""

from pathlib import Path

import torch

from manylora.adapters.types import AdapterWeights
from manylora.server.kernels.plain.arena import PlainArena
from manylora.server.kernels.step import RankRange
from manylora.server.model.config import ModelConfig
from tests.server.model.models import save_model
from tests.server.model.steps import Stream, all_logits, load, place, random_adapter, step


def uneven(config: ModelConfig) -> AdapterWeights:
    """Rank 8 in the first layer's q_proj, 3 in the second's, and v_proj in the second only."""
    first, second = config.module_paths(0), config.module_paths(1)
    large, small = (
        random_adapter(config, 8, 1, ("q_proj",)),
        random_adapter(config, 3, 2, ("q_proj", "v_proj")),
    )
    return AdapterWeights(
        {
            first["q_proj"]: large.pairs[first["q_proj"]],
            second["q_proj"]: small.pairs[second["q_proj"]],
            second["v_proj"]: small.pairs[second["v_proj"]],
        }
    )


def test_an_adapter_has_nothing_of_the_one_whose_rows_it_takes(tmp_path: Path) -> None:
    """Where a layer uses fewer rows than the range has, or none, what another adapter left there must not answer."""
    save_model("qwen2", tmp_path)
    found = []
    for before in (False, True):
        model = load(tmp_path)
        config = model.decoder.config
        if before:
            place(model, [random_adapter(config, 64, seed) for seed in range(3)])
        (ranges,) = place(model, [uneven(config)], first_row=20)
        assert {module: owned.rank for module, owned in ranges.items()} == {"q_proj": 8, "v_proj": 3}
        stream = Stream(0, list(range(40)), ((ranges, 1.0),))
        step(model, [(stream, 40)])
        found.append(all_logits(stream))
    assert torch.equal(*found)


def test_writing_touches_no_row_of_another(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    model = load(tmp_path)
    config = model.decoder.config
    assert isinstance(model.arena, PlainArena)
    for layer in model.arena.layers:
        for buffers in layer.pairs.values():
            for buffer in buffers:
                buffer.fill_(7.0)
    model.arena.write({"q_proj": RankRange(10, 8), "v_proj": RankRange(30, 3)}, uneven(config))
    for layer in model.arena.layers:
        for module, buffers in layer.pairs.items():
            own = {"q_proj": slice(10, 18), "v_proj": slice(30, 33)}.get(module, slice(0, 0))
            for buffer in buffers:
                assert not (buffer[own] == 7.0).any()
                rest = torch.ones(buffer.shape[0], dtype=torch.bool)
                rest[own] = False
                assert (buffer[rest] == 7.0).all()

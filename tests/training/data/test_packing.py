"""Packed rows hold every example once, are well filled, and let no example see another."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from manylora.training.data.collate import Collator
from manylora.training.data.items import PackedItems
from manylora.training.data.packing import pack
from manylora.training.data.render import IGNORED


@given(st.integers(1, 60).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room)))))
def test_every_example_stands_in_one_row_that_holds_it(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    rows = pack(lengths, capacity)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    totals = [sum(lengths[example] for example in row) for row in rows]
    assert all(0 < total <= capacity for total in totals)
    assert sum(2 * total <= capacity for total in totals) <= 1  # two half empty rows would have been one
    assert rows == pack(lengths, capacity)


def test_examples_fill_what_longer_ones_leave() -> None:
    assert pack([3, 10, 7, 5, 5], 10) == [[0, 2], [1], [3, 4]]


class Tokens:
    """Stands for a datasets.Dataset: takes a list of numbers, gives columns."""

    def __init__(self, examples: list[list[int]]) -> None:
        self.examples = examples

    def __getitem__(self, numbers: list[int]) -> dict[str, list[list[int]]]:
        chosen = [self.examples[number] for number in numbers]
        return {"input_ids": [list(one) for one in chosen], "labels": [list(one) for one in chosen]}


LENGTHS = [5, 23, 9, 14, 30, 2, 17, 11]
VOCABULARY = 61
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2, sliding window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, sliding window": {"model_type": "mistral", "sliding_window": 6},
}


def tiny(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    options = dict(FAMILIES[family])
    config = AutoConfig.for_model(
        options.pop("model_type"),
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that attention isn't nearly uniform
    return model.eval()


def packed_items() -> tuple[list[list[int]], PackedItems, list[list[int]]]:
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = pack(LENGTHS, 40)
    return examples, PackedItems(Tokens(examples), rows), rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_packed_examples_are_those_of_examples_alone(family: str, attention: str) -> None:
    model = tiny(family, attention)
    examples, items, rows = packed_items()
    batch = Collator(0, 8)([items[index] for index in range(len(items))])
    assert (batch["input_ids"] == 0).any()  # there is padding
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for number, row in enumerate(rows):
            start = 0
            for example in row:
                alone = model(torch.tensor([examples[example]]), use_cache=False).logits[0]
                torch.testing.assert_close(
                    packed[number, start : start + LENGTHS[example]], alone, atol=1e-5, rtol=1e-5
                )
                start += LENGTHS[example]


def loss_sum(model: Any, batch: Any) -> tuple[Tensor, int]:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, int((labels != IGNORED).sum())


def test_the_loss_of_packed_rows_is_that_of_padded_examples() -> None:
    model = tiny("qwen2", "sdpa")
    examples, items, _ = packed_items()
    with torch.no_grad():
        packed, packed_count = loss_sum(model, Collator(0)([items[index] for index in range(len(items))]))
        padded, count = loss_sum(model, Collator(0)([{"input_ids": one, "labels": one} for one in examples]))
    assert packed_count == count == sum(LENGTHS) - len(LENGTHS)
    assert abs(packed.item() - padded.item()) / count < 1e-5


def test_batches_are_padded_on_the_right() -> None:
    batch = Collator(9, 4)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100], [4, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert "position_ids" not in batch
    assert all(tensor.dtype == torch.int64 for tensor in (batch["input_ids"], batch["labels"]))


def test_packed_batches_have_positions_and_no_attention_mask() -> None:
    item = {"input_ids": [1, 2, 3], "labels": [-100, 2, -100], "position_ids": [0, 1, 0]}
    batch = Collator(9)([item, {"input_ids": [4], "labels": [-100], "position_ids": [0]}])
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert "attention_mask" not in batch

"""Reading what adapters change of embedding and head: what is kept of it, and what is refused, by field or tensor."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.header import TensorEntry
from manylora.adapters.reader import AdapterOutline, LoadedAdapter, inspect_adapter, read_adapter
from manylora.adapters.vocabulary import UNIT, BaseVocabulary
from manylora.adapters.vocabulary import VOCABULARY as ROOM
from manylora.adapters.vocabulary_outline import ModuleOutline, VocabularyOutline
from tests.adapters.making import HIDDEN, MODULES, VOCABULARY, factors, write

EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
OWN = {
    path: torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(seed))
    for seed, path in enumerate(("model.embed_tokens", "lm_head"))
}
UNTIED = BaseVocabulary(VOCABULARY, HIDDEN, tied=False, show=OWN.__getitem__)
TIED = BaseVocabulary(VOCABULARY, HIDDEN, tied=True, show=lambda path: OWN["model.embed_tokens"])
TOKENIZER = {"tokenizer.json": "{}"}
ROWS = "token_adapter.trainable_tokens_delta"


def table(rows: int = VOCABULARY, seed: int = 9) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


def made(
    directory: Path,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, str] | None = None,
    **changes: object,
) -> Path:
    every = {**factors(), **{name: tensor.clone() for name, tensor in tensors.items()}}
    return write(directory, tensors=every, changes=changes, files=files)


def read(
    directory: Path, base: BaseVocabulary | None = UNTIED, dtype: torch.dtype = torch.float32
) -> LoadedAdapter:
    return read_adapter(directory, MODULES, max_rank=16, dtype=dtype, vocab_size=VOCABULARY, vocabulary=base)


def outline(directory: Path, base: BaseVocabulary = UNTIED) -> AdapterOutline:
    return inspect_adapter(directory, MODULES, max_rank=16, vocab_size=VOCABULARY, vocabulary=base)


def test_of_a_whole_module_only_rows_that_are_not_the_bases_are_kept(tmp_path: Path) -> None:
    own = OWN["model.embed_tokens"].clone()
    own[[3, 60]] += 1
    path = made(tmp_path, {f"{EMBED}.weight": own}, modules_to_save=["embed_tokens"])
    found = read(path).weights.vocabulary
    assert found is not None
    assert found.embedding.rows is not None
    assert found.embedding.rows.ids is not None
    assert found.embedding.rows.ids.tolist() == [3, 60]
    assert torch.equal(found.embedding.rows.rows, own[[3, 60]])
    assert not found.head
    assert found.nbytes == 2 * HIDDEN * 4 + 2 * 8
    assert read(path).weights.rank_by_module()[ROOM] == 1
    assert outline(path).rank_by_module()[ROOM] == -(-own.nbytes // UNIT)


def test_a_whole_module_of_which_most_differs_is_kept_whole(tmp_path: Path) -> None:
    path = made(tmp_path, {f"{HEAD}.weight": table()}, modules_to_save=["lm_head"])
    found = read(path, dtype=torch.bfloat16).weights.vocabulary
    assert found is not None
    assert found.head.rows is not None
    assert found.head.rows.ids is None
    assert torch.equal(found.head.rows.rows, table().to(torch.bfloat16))


def test_what_it_takes_at_most_is_reckoned_as_it_is_served(tmp_path: Path) -> None:
    size = 40_000
    base = BaseVocabulary(size, HIDDEN, tied=False)
    path = made(tmp_path, {f"{HEAD}.weight": table(size)}, modules_to_save=["lm_head"])
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        found = inspect_adapter(path, MODULES, max_rank=16, vocab_size=size, vocabulary=base, dtype=dtype)
        assert found.rank_by_module()[ROOM] == -(-size * HIDDEN * width // UNIT)


def test_copies_of_the_base_that_peft_saves_are_no_change(tmp_path: Path) -> None:
    """save_embedding_layers writes both, changed or not."""
    copies = {f"{EMBED}.weight": OWN["model.embed_tokens"], f"{HEAD}.weight": OWN["lm_head"]}
    weights = read(made(tmp_path, copies)).weights
    assert weights.vocabulary is None
    assert ROOM not in weights.rank_by_module()


def test_a_tied_base_has_one_copy_of_what_both_share(tmp_path: Path) -> None:
    path = made(
        tmp_path, {f"{EMBED}.token_adapter.trainable_tokens_delta": table(2)}, trainable_token_indices=[9, 4]
    )
    tied, untied = read(path, TIED).weights.vocabulary, read(path, UNTIED).weights.vocabulary
    assert tied is not None
    assert untied is not None
    assert tied.head.rows is tied.embedding.rows
    assert not untied.head
    assert tied.nbytes == untied.nbytes
    assert tied.embedding.rows is not None
    assert tied.embedding.rows.ids is not None
    assert tied.embedding.rows.ids.tolist() == [4, 9]
    assert torch.equal(tied.embedding.rows.rows, table(2)[[1, 0]])


@pytest.mark.parametrize("most", [False, True])
def test_trained_rows_are_in_the_place_of_those_of_a_copy_beside_them(tmp_path: Path, most: bool) -> None:
    """peft saves a resized embedding with what was trained of it."""
    own = table() if most else OWN["model.embed_tokens"].clone()
    own[[3, 60]] += 1
    path = made(
        tmp_path,
        {f"{EMBED}.token_adapter.base_layer.weight": own, f"{EMBED}.{ROWS}": table(2, 5)},
        trainable_token_indices=[9, 3],
    )
    found = read(path).weights.vocabulary
    assert found is not None
    assert found.embedding.rows is not None
    expected = own.clone()
    expected[[9, 3]] = table(2, 5)
    ids = found.embedding.rows.ids
    assert (None if ids is None else ids.tolist()) == (None if most else [3, 9, 60])
    assert torch.equal(found.embedding.rows.rows, expected if most else expected[[3, 9, 60]])


def test_the_most_that_it_takes_counts_rows_that_both_share_once_and_factors_beside_them() -> None:
    rows, a, b = (TensorEntry(name, (100, 1000), 0, 0) for name in ("rows", "a", "b"))
    shared = ModuleOutline(trained=tuple(range(100_000)), rows=rows)
    head = replace(shared, factors=(a, b))
    for modules, numbers in (
        ({"embedding": shared}, 100_000),
        ({"embedding": shared, "head": shared}, 100_000),
        ({"embedding": shared, "head": head}, 300_000),
        ({"embedding": shared, "head": replace(head, table=a)}, 500_000),
    ):
        ids = 100_000 * 8 * (2 if numbers > 400_000 else 1)
        assert VocabularyOutline(1000, modules).units(4) == -(-(numbers * 4 + ids) // UNIT)


def test_the_scale_is_folded_into_factors_of_embedding_and_head(tmp_path: Path) -> None:
    tensors = {
        f"{EMBED}.lora_embedding_A": table(4, 1)[:, :1].expand(4, VOCABULARY),
        f"{EMBED}.lora_embedding_B": table(HIDDEN, 2)[:, :4],
        f"{HEAD}.lora_A.weight": table(4, 3),
        f"{HEAD}.lora_B.weight": table(VOCABULARY, 4)[:, :4],
    }
    targets = ["q_proj", "v_proj", "embed_tokens", "lm_head"]
    found = read(made(tmp_path, tensors, target_modules=targets)).weights.vocabulary
    assert found is not None
    assert found.embedding.factors is not None
    assert found.head.factors is not None
    assert found.nbytes == 2 * 4 * (VOCABULARY + HIDDEN) * 4
    assert torch.equal(found.embedding.factors.b, tensors[f"{EMBED}.lora_embedding_B"].T * 2)
    assert torch.equal(found.head.factors.a, tensors[f"{HEAD}.lora_A.weight"])
    assert torch.equal(found.head.factors.b, tensors[f"{HEAD}.lora_B.weight"].T * 2)


def test_an_adapter_may_change_nothing_but_the_head(tmp_path: Path) -> None:
    tensors = {
        f"{HEAD}.lora_A.weight": table(4),
        f"{HEAD}.lora_B.weight": table(VOCABULARY)[:, :4].contiguous(),
    }
    write(tmp_path, tensors=tensors, changes={"target_modules": ["lm_head"]})
    weights = read(tmp_path).weights
    assert not weights.pairs
    assert weights.rank_by_module() == {ROOM: 1}


def test_rows_beyond_the_bases_make_it_larger(tmp_path: Path) -> None:
    grown = {
        f"{EMBED}.weight": torch.cat((OWN["model.embed_tokens"], table(3))),
        f"{HEAD}.weight": torch.cat((OWN["lm_head"], table(3, 5))),
    }
    loaded = read(made(tmp_path, grown, TOKENIZER, modules_to_save=["embed_tokens", "lm_head"]))
    found = loaded.weights.vocabulary
    assert found is not None
    assert found.size == loaded.text.vocab_size == VOCABULARY + 3
    assert found.head.rows is not None
    assert found.head.rows.ids is not None
    assert found.head.rows.ids.tolist() == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]


REFUSED: list[tuple[dict[str, Tensor], dict[str, object], BaseVocabulary | None, type[Exception], str]] = [
    ({}, {"modules_to_save": ["embed_tokens"]}, UNTIED, InvalidAdapter, r"embed_tokens\.weight is missing"),
    ({}, {"modules_to_save": ["norm"]}, UNTIED, UnsupportedAdapter, "modules_to_save names 'norm'"),
    ({}, {"modules_to_save": "lm_head"}, UNTIED, InvalidAdapter, "modules_to_save is 'lm_head'"),
    (
        {f"{HEAD}.weight": table(VOCABULARY, 1)[:, :5]},
        {"modules_to_save": ["lm_head"]},
        UNTIED,
        InvalidAdapter,
        r"lm_head\.weight: has shape \[64, 5\]; .* needs \[64, 32\]",
    ),
    (
        {f"{HEAD}.weight": table()[0]},
        {"modules_to_save": ["lm_head"]},
        UNTIED,
        InvalidAdapter,
        r"has shape \[32\]",
    ),
    (
        {f"{HEAD}.weight": table().index_fill(0, torch.tensor([7]), torch.nan)},
        {"modules_to_save": ["lm_head"]},
        UNTIED,
        InvalidAdapter,
        "NaN",
    ),
    (
        {f"{HEAD}.weight": table(VOCABULARY + 2)},
        {"modules_to_save": ["lm_head"]},
        UNTIED,
        InvalidAdapter,
        "embedding has rows for 64 tokens and the head for 66",
    ),
    (
        {f"{EMBED}.{ROWS}": table(1)},
        {"trainable_token_indices": [-1]},
        UNTIED,
        InvalidAdapter,
        "token ids from 0",
    ),
    ({f"{EMBED}.{ROWS}": table(2)}, {"trainable_token_indices": [5, 5]}, UNTIED, InvalidAdapter, "5 twice"),
    ({f"{EMBED}.{ROWS}": table(1)}, {"trainable_token_indices": [99]}, UNTIED, InvalidAdapter, "token id 99"),
    (
        {f"{EMBED}.{ROWS}": table(3)},
        {"trainable_token_indices": [1]},
        UNTIED,
        InvalidAdapter,
        r"needs \[1, 32\]",
    ),
    (
        {f"{EMBED}.weight": table(), "base_model.model.embed_tokens.weight": table()},
        {"modules_to_save": ["embed_tokens"]},
        UNTIED,
        InvalidAdapter,
        "is there twice",
    ),
    (
        {f"{EMBED}.{ROWS}": table(1), f"{HEAD}.{ROWS}": table(1)},
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        TIED,
        InvalidAdapter,
        "names other tokens for the head",
    ),
    ({}, {"trainable_token_indices": [1]}, UNTIED, InvalidAdapter, f"{ROWS} is missing"),
    ({}, {"trainable_token_indices": {"norm": [1]}}, UNTIED, UnsupportedAdapter, "'norm'"),
    ({f"{EMBED}.{ROWS}": table(1)}, {}, UNTIED, InvalidAdapter, "the config doesn't ask for it"),
    (
        {f"{EMBED}.{ROWS}": table(1), f"{EMBED}.weight": table()},
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        UNTIED,
        UnsupportedAdapter,
        "both name model.embed_tokens",
    ),
    (
        {f"{EMBED}.weight": table()},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        UNTIED,
        InvalidAdapter,
        "ensure_weight_tying is set, but this base's head is not its embedding",
    ),
    (
        {},
        {"target_modules": ["q_proj", "v_proj", "lm_head"], "alora_invocation_tokens": [1]},
        UNTIED,
        UnsupportedAdapter,
        "alora_invocation_tokens is set and target_modules names lm_head",
    ),
    (
        {f"{EMBED}.weight": table()},
        {"alora_invocation_tokens": [1]},
        UNTIED,
        UnsupportedAdapter,
        "alora_invocation_tokens is set, and the adapter changes embedding or head",
    ),
    (
        {f"{EMBED}.{ROWS}": table(1), f"{HEAD}.{ROWS}": table(1)},
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}},
        None,
        UnsupportedAdapter,
        "only factors of the blocks' layers",
    ),
    (
        {},
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        UNTIED,
        InvalidAdapter,
        r"lm_head\.lora_A.* is missing",
    ),
    (
        {f"{HEAD}.lora_A.weight": table(4), f"{HEAD}.lora_B.weight": table(60)[:, :4]},
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        UNTIED,
        InvalidAdapter,
        r"lora_B.weight: has shape \[60, 4\]",
    ),
]


@pytest.mark.parametrize(("tensors", "changes", "base", "kind", "says"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    changes: dict[str, object],
    base: BaseVocabulary | None,
    kind: type[Exception],
    says: str,
) -> None:
    path = made(tmp_path, tensors, None, **changes)
    with pytest.raises(kind, match=says):
        read(path, base)


def test_rows_that_no_tokenizer_names_are_refused(tmp_path: Path) -> None:
    grown = {f"{EMBED}.weight": table(VOCABULARY + 2), f"{HEAD}.weight": table(VOCABULARY + 2)}
    path = made(tmp_path, grown, modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(InvalidAdapter, match=r"rows for the ids 64 to 65, which no tokenizer names"):
        read(path)
    (path / "tokenizer.json").write_text("{}")
    assert read(path).text.vocab_size == VOCABULARY + 2


def test_a_head_for_a_tied_base_that_is_none_of_it_is_told(tmp_path: Path) -> None:
    tensors = {f"{HEAD}.lora_A.weight": table(4), f"{HEAD}.lora_B.weight": table(VOCABULARY)[:, :4]}
    path = made(tmp_path, tensors)
    with pytest.raises(InvalidAdapter, match="whose head is its embedding"):
        read(path, TIED)


def test_overflow_of_the_serving_dtype_is_named(tmp_path: Path) -> None:
    path = made(tmp_path, {f"{HEAD}.weight": table() * 1e6}, modules_to_save=["lm_head"])
    read(path)
    with pytest.raises(InvalidAdapter, match=r"lm_head\.weight: overflows torch\.float16"):
        read(path, dtype=torch.float16)

"""How texts are pooled with an adapter, as sentence-transformers writes it; adapters of models without a head."""

import json
from pathlib import Path

import pytest
import torch

from manylora.adapters.errors import AdapterPathForbidden, InvalidAdapter, UnsupportedAdapter
from manylora.adapters.pooling import read_pooling
from manylora.adapters.reader import inspect_adapter, read_adapter
from manylora.adapters.sources.local import LocalSource, operator_source, resolve_source
from manylora.adapters.store import AdapterStore
from tests.adapters.making import MODULES, factors, write

ST = "sentence_transformers.models."
FLAGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
LIMIT = 1 << 20


def flags(*on: str, **more: object) -> dict[str, object]:
    """A config as sentence-transformers wrote it for years."""
    told = {f"pooling_mode_{each}": each in on for each in FLAGS}
    return {"word_embedding_dimension": 32, **told, "include_prompt": True, **more}


def modules(*kinds: str, pooling: str = "1_Pooling") -> list[dict[str, object]]:
    paths = {"Transformer": "", "Pooling": pooling}
    return [
        {"idx": number, "name": str(number), "path": paths.get(kind, f"{number}_{kind}"), "type": ST + kind}
        for number, kind in enumerate(kinds)
    ]


def said(directory: Path, config: object, listed: object = None) -> Path:
    """Write what is said of pooling into a directory."""
    (directory / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if listed is not None:
        (directory / "modules.json").write_text(json.dumps(listed))
    return directory


@pytest.mark.parametrize(
    ("config", "way"),
    [
        (flags("mean_tokens"), "mean"),
        (flags("lasttoken"), "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"word_embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_a_way_is_read_in_each_form(tmp_path: Path, config: object, way: str) -> None:
    listed = modules("Transformer", "Pooling", "Normalize")
    assert read_pooling(said(write(tmp_path), config, listed)) == way
    assert inspect_adapter(tmp_path, MODULES, max_rank=8).text.pooling == way


def test_nothing_said_is_nothing(tmp_path: Path) -> None:
    assert read_pooling(write(tmp_path)) is None
    assert inspect_adapter(tmp_path, MODULES, max_rank=8).text.poolings == frozenset()


@pytest.mark.parametrize(
    ("config", "listed", "told"),
    [
        (flags("cls_token"), None, "pooled by cls:"),
        (flags("max_tokens"), None, "pooled by max:"),
        (flags("mean_tokens", "lasttoken"), None, "mean and lasttoken"),
        ({"pooling_mode": "mean+max"}, None, "mean and max"),
        ({"pooling_mode": "weightedmean"}, None, "weightedmean"),
        (flags("mean_tokens", include_prompt=False), None, "include_prompt"),
        (flags("mean_tokens"), modules("Transformer", "Pooling", "Dense"), "Dense"),
        (flags("mean_tokens"), modules("Transformer", "Pooling", pooling="2_Pooling"), "2_Pooling"),
    ],
)
def test_what_is_not_done_is_refused_by_its_name(
    tmp_path: Path, config: object, listed: object, told: str
) -> None:
    said(write(tmp_path), config, listed)
    with pytest.raises(UnsupportedAdapter, match=told):
        inspect_adapter(tmp_path, MODULES, max_rank=8)


@pytest.mark.parametrize(("config", "listed"), [(flags(), None), ([], None), (flags("lasttoken"), {"a": 1})])
def test_what_says_nothing_right_is_refused(tmp_path: Path, config: object, listed: object) -> None:
    said(write(tmp_path), config, listed)
    with pytest.raises(InvalidAdapter):
        inspect_adapter(tmp_path, MODULES, max_rank=8)


def test_what_is_said_is_kept_in_the_store_and_counts_for_the_digest(tmp_path: Path) -> None:
    source = said(write(tmp_path / "source"), flags("mean_tokens"))
    store = AdapterStore(tmp_path / "store")
    staged = store.stage(LocalSource(source))
    path = store.publish(staged)
    assert read_pooling(path) == "mean"
    assert store.is_intact(staged.digest)
    assert store.nbytes(staged.digest) == staged.nbytes
    other = store.stage(LocalSource(said(source, flags("lasttoken"))))
    assert other.digest != staged.digest
    AdapterStore(tmp_path / "store").verify(staged.digest)
    store.remove(staged.digest)
    assert not path.exists()


def test_no_folder_that_is_a_link_leads_out_of_the_root(tmp_path: Path) -> None:
    adapter = write(tmp_path / "root" / "adapter")
    outside = said(tmp_path / "outside", flags("mean_tokens"))
    (adapter / "1_Pooling").symlink_to(outside / "1_Pooling")
    with pytest.raises(AdapterPathForbidden, match="1_Pooling"):
        resolve_source("adapter", tmp_path / "root").open(LIMIT)
    inside = said(tmp_path / "root" / "inside", flags("mean_tokens"))
    (adapter / "1_Pooling").unlink()
    (adapter / "1_Pooling").symlink_to(inside / "1_Pooling")
    with resolve_source("adapter", tmp_path / "root").open(LIMIT) as files:
        assert "1_Pooling/config.json" in files.sizes


@pytest.mark.parametrize("by_link", [False, True])
def test_a_file_where_the_folder_should_be_is_called_one(tmp_path: Path, by_link: bool) -> None:
    """Not a link that came while it was opened, which may be tried again."""
    adapter = write(tmp_path / "root" / "adapter")
    file = tmp_path / "root" / "file" if by_link else adapter / "1_Pooling"
    file.write_text("{}")
    if by_link:
        (adapter / "1_Pooling").symlink_to(file)
    for source in (resolve_source("adapter", tmp_path / "root"), operator_source(adapter)):
        with pytest.raises(InvalidAdapter, match="is not a folder"):
            source.open(LIMIT)


def test_an_adapter_of_a_model_without_its_head_is_that_of_the_whole(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole")
    inner = {name.replace("model.model.", "model.", 1): tensor for name, tensor in factors().items()}
    headless = write(tmp_path / "inner", tensors=inner, changes={"task_type": "FEATURE_EXTRACTION"})
    found, expected = (
        read_adapter(each, MODULES, max_rank=8, dtype=torch.float32).weights.pairs
        for each in (headless, whole)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path].b, pair.b) for path, pair in expected.items())
    mixed = {**inner, next(iter(factors())): next(iter(inner.values())).clone()}
    with pytest.raises(InvalidAdapter):
        inspect_adapter(write(tmp_path / "mixed", tensors=mixed), MODULES, max_rank=8)

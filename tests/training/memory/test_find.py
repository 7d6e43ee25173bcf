"""A base's sizes by its name."""

import json
from pathlib import Path

import pytest

from manylora.training.errors import BaseRefused
from manylora.training.memory.find import read_shape
from tests.training.memory.test_shape import FIRST_QWEN_7B


def test_a_directory_its_config_and_a_lone_config_are_the_same(tmp_path: Path) -> None:
    for path in (tmp_path / "config.json", tmp_path / "qwen-7b.json"):
        path.write_text(json.dumps(FIRST_QWEN_7B))
    shapes = {read_shape(str(tmp_path / name)) for name in ("", "config.json", "qwen-7b.json")}
    assert len(shapes) == 1


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_formats_of_old_checkpoints_stand_beside(tmp_path: Path, name: str, method: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIRST_QWEN_7B))
    (tmp_path / name).write_text(json.dumps({"bits": 4, "group_size": 64}))
    shape = read_shape(str(tmp_path))
    assert (shape.quantization, shape.group_size) == (method, 64)


def test_what_is_not_there_is_refused_without_a_look_at_the_hub(tmp_path: Path) -> None:
    for name in (str(tmp_path / "no"), "./no", "no", "a/b/c", "a/b.json"):
        with pytest.raises(BaseRefused, match="expected a model's directory"):
            read_shape(name)


def test_a_directory_that_is_no_models_is_not_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(BaseRefused, match=r"there is no config\.json in"):
        read_shape(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseRefused, match="is an adapter; name the base"):
        read_shape(str(tmp_path))

"""An adapter says on which form of its base it was trained, and it is said where it is served on another."""

import json
from pathlib import Path

import pytest

from manylora.adapters.base_form import BaseForm, read_base_form, trained_otherwise
from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.files import BASE_FILE, digest_of
from manylora.adapters.reader import MAX_ADAPTER_BYTES, inspect_adapter
from tests.adapters.making import MODULES, write

DENSE, NF4, DOUBLE, GPTQ = BaseForm("dense"), BaseForm("nf4"), BaseForm("nf4", True), BaseForm("gptq")


def says(place: Path, **held: object) -> Path:
    return write(place, files={BASE_FILE: json.dumps(held)})


def test_the_file_beside_an_adapter_is_read_with_it(tmp_path: Path) -> None:
    assert read_base_form(write(tmp_path / "foreign")) is None
    held = says(tmp_path / "a", kind="nf4", double_quant=True, dtype="bf16", directory="/somewhere")
    assert read_base_form(held) == BaseForm("nf4", True, "bf16")
    assert inspect_adapter(held, MODULES, max_rank=8).trained_on == BaseForm("nf4", True, "bf16")
    assert read_base_form(says(tmp_path / "b", kind="dense", double_quant=False)) == DENSE


def test_it_is_part_of_what_an_adapter_is(tmp_path: Path) -> None:
    digests = {
        digest_of(directory, MAX_ADAPTER_BYTES)
        for directory in (
            write(tmp_path / "foreign"),
            says(tmp_path / "a", kind="nf4"),
            says(tmp_path / "b", kind="dense"),
        )
    }
    assert len(digests) == 3


@pytest.mark.parametrize("held", [{}, {"kind": 4}, {"kind": "nf4", "double_quant": "yes"}])
def test_a_file_that_says_nothing_is_refused_by_its_name(tmp_path: Path, held: dict[str, object]) -> None:
    with pytest.raises(InvalidAdapter, match=BASE_FILE):
        inspect_adapter(says(tmp_path, **held), MODULES, max_rank=8)


@pytest.mark.parametrize(
    ("trained", "served", "advice"),
    [
        (DENSE, NF4, "start the server with --quantization none"),
        (DENSE, DOUBLE, "start the server with --quantization none"),
        (DOUBLE, NF4, "start the server with --double-quant"),
        (NF4, DOUBLE, "start the server without --double-quant"),
        (NF4, DENSE, "start the server without --quantization none"),
        (GPTQ, NF4, "serve the base that it was trained on"),
    ],
)
def test_another_form_is_told_with_what_to_do(trained: BaseForm, served: BaseForm, advice: str) -> None:
    said = trained_otherwise(trained, served, from_16bit=True)
    assert said is not None
    assert f"({trained})" in said
    assert f"({served})" in said
    assert said.endswith(advice)


def test_a_checkpoint_that_is_quantised_can_not_be_served_otherwise() -> None:
    said = trained_otherwise(DENSE, GPTQ, from_16bit=False)
    assert said is not None
    assert said.endswith("serve the base that it was trained on")


@pytest.mark.parametrize("form", [None, DENSE, NF4, DOUBLE, GPTQ, BaseForm("nf4", dtype="fp32")])
def test_nothing_is_said_of_the_same_form_or_of_none(form: BaseForm | None) -> None:
    served = NF4 if form is None or form.dtype else form
    assert trained_otherwise(form, served, from_16bit=True) is None

"""A model's config.json says how it is served: read back as written, obeyed in its type, and its losses told."""

import pytest
import torch

from manylora.quant.errors import CorruptCheckpoint
from manylora.quant.served_form import SECTION, ServedForm, served_form

FORM = ServedForm("float16", {"bfloat16": 0.78, "float16": 0.9997}, nf4_moves=0.41, adapter_moves=0.45)


def test_what_is_written_is_read() -> None:
    assert served_form({SECTION: FORM.section()}) == FORM
    assert served_form({SECTION: ServedForm("bfloat16").section()}) == ServedForm("bfloat16")
    assert served_form({"model_type": "qwen2"}) is None


@pytest.mark.parametrize(
    ("form", "usual", "cpu", "gpu"),
    [
        ("bfloat16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("float16", torch.bfloat16, torch.float32, torch.float16),
        ("float16", torch.float32, torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_a_type_that_holds_the_weights_is_taken(
    form: str, usual: torch.dtype, cpu: torch.dtype, gpu: torch.dtype
) -> None:
    assert ServedForm(form).dtype_for(usual, cpu=True) is cpu
    assert ServedForm(form).dtype_for(usual, cpu=False) is gpu


def test_what_is_lost_is_told_and_nothing_else() -> None:
    assert FORM.costs(torch.float16, quantised=None) == ()
    assert FORM.costs(torch.float32, quantised=None) == ()
    [narrow] = FORM.costs(torch.bfloat16, quantised=None)
    assert "in bfloat16 78.0% of what was merged into it is left" in narrow
    [four_bit] = FORM.costs(torch.float32, quantised="nf4")
    assert "in NF4 its logits move by 0.41; what was merged into it had moved them by 0.45" in four_bit
    for unmeasured in ServedForm("float32").costs(torch.bfloat16, quantised=None):
        assert "may be lost" in unmeasured


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("none", "not an object"),
        ({"quantization": "int8", "dtype": "bfloat16"}, "quantization"),
        ({"quantization": "none"}, "dtype"),
        ({"quantization": "none", "dtype": "fp8"}, "fp8"),
        ({"quantization": "none", "dtype": ["bfloat16"]}, "dtype"),
    ],
)
def test_a_section_that_can_not_be_understood_is_refused(section: object, says: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=says):
        served_form({SECTION: section})

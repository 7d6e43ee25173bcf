"""By default a merge keeps the answers: into the form of the base that the adapter was trained on, in a type that holds
it, and the result says how it is served. What is asked for instead is refused with what helps, and only that."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.adapters.export.errors import ExportFailed
from manylora.adapters.export.export import export
from manylora.adapters.export.settings import ExportPart, ExportSettings
from manylora.adapters.files import BASE_FILE
from manylora.adapters.reader import read_adapter
from manylora.adapters.types import ModuleShape
from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter
from manylora.quant.checkpoint import Checkpoint
from manylora.quant.served_form import served_form
from manylora.server.kernels.plain import PlainBackend
from manylora.server.model.loader import load_weights
from tests.adapters.export.making import load, make_base, settings
from tests.server.model.steps import Stream, all_logits, place, step
from tests.server.model.steps import load as load_ours

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
TOKENS = [5, 17, 300, 42, 99, 7, 230, 12, 9, 31, 250, 3]
FAINT = 2e-3
"""Of the factors: a change that bfloat16 loses."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), "qwen2-untied")


def adapter_of(directory: Path, base: Path, held: dict[str, object] | None, strength: float = FAINT) -> Path:
    """An adapter that says how its base was held in training, or says nothing."""
    adapter = write_adapter(directory, base, AdapterShape(rank=4, strength=strength))
    if held is not None:
        (adapter / BASE_FILE).write_text(json.dumps({"dtype": "bf16", "directory": str(base), **held}))
    return adapter


def served(directory: Path, adapter: Path | None = None, **form: Any) -> torch.Tensor:
    """What the server computes in float32, which holds whatever the merge was written in."""
    model = load_ours(directory, **{"quantization": "auto", **form})
    stream = Stream(0, TOKENS)
    if adapter is not None:
        modules = {path: ModuleShape(*shape) for path, shape in model.decoder.config.base_modules().items()}
        weights = read_adapter(adapter, modules, max_rank=64, dtype=torch.float32).weights
        stream = Stream(0, TOKENS, ((place(model, [weights])[0], 1.0),))
    step(model, [(stream, len(TOKENS))])
    return all_logits(stream)


FORMS: list[tuple[dict[str, object] | None, dict[str, Any], dict[str, object]]] = [
    ({"kind": "dense", "double_quant": False}, {"quantization": "none"}, {}),
    ({"kind": "nf4", "double_quant": False}, {"quantization": "nf4"}, {}),
    ({"kind": "nf4", "double_quant": True}, {"quantization": "nf4", "double_quant": True}, {}),
    (None, {"quantization": "auto"}, {}),
    (None, {"quantization": "none"}, {"served_dense": True}),
    # Of what a server holds the server itself knows best.
    ({"kind": "nf4", "double_quant": True}, {"quantization": "nf4"}, {"double_quant": False}),
]


@pytest.mark.parametrize(("held", "form", "asked"), FORMS)
def test_what_is_merged_by_default_answers_as_the_adapter_did(
    tmp_path: Path, base: Path, held: dict[str, object] | None, form: dict[str, Any], asked: dict[str, object]
) -> None:
    adapter, out = adapter_of(tmp_path / "adapter", base, held), tmp_path / "out"
    export(settings(base, adapter, out, **asked))
    alone, beside = served(base, **form), served(base, adapter, **form)
    # As it is served when nobody says how: by its own config.
    moved = torch.linalg.vector_norm(served(out) - beside) / torch.linalg.vector_norm(beside - alone)
    assert moved < 0.05
    # The check bites: quantised again, the change is gone.
    again = served(out, quantization="nf4", double_quant=bool(form.get("double_quant")))
    if form["quantization"] != "none":
        assert torch.linalg.vector_norm(again - beside) / torch.linalg.vector_norm(beside - alone) > 0.5


@pytest.mark.parametrize("strength", [1.0, FAINT, 2e-5])
def test_the_narrowest_type_that_keeps_the_change_is_taken(
    tmp_path: Path, base: Path, strength: float
) -> None:
    adapter = adapter_of(tmp_path / "adapter", base, {"kind": "dense"}, strength)
    report = export(settings(base, adapter, tmp_path / "out"))
    kept: Any = report.manifest["kept_by_dtype"]
    assert list(kept) == ["bfloat16", "float16", "float32"]
    expected = next(name for name, share in kept.items() if share >= 0.999)
    assert report.manifest["dtype"] == expected
    assert report.manifest["change_kept"] == pytest.approx(1, abs=0.001)
    weight = Checkpoint(tmp_path / "out").read("model.layers.0.self_attn.q_proj.weight")
    assert str(weight.dtype) == f"torch.{expected}"
    own = served_form(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert own is not None
    assert own.dtype == expected
    assert own.kept == kept


def test_the_types_of_faint_and_strong_changes_differ(tmp_path: Path, base: Path) -> None:
    found = []
    for strength in (1.0, 2e-5):
        adapter = adapter_of(tmp_path / f"{strength}", base, {"kind": "dense"}, strength)
        found.append(export(settings(base, adapter, tmp_path / f"out-{strength}")).manifest["dtype"])
    assert found[0] == "bfloat16"
    assert found[1] == "float32"


def test_a_type_that_loses_the_change_is_refused_with_one_that_keeps_it(tmp_path: Path, base: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", base, {"kind": "dense"}, 2e-4)
    with pytest.raises(ExportFailed, match="rounding took away") as refused:
        export(settings(base, adapter, tmp_path / "out", dtype="bfloat16"))
    said = str(refused.value)
    assert "--into" not in said
    assert "merged-4bit" not in said
    dtype = said.split("--dtype ")[1].split()[0]
    report = export(settings(base, adapter, tmp_path / "out", dtype=dtype))
    assert report.manifest["change_kept"] > 0.999  # type: ignore[operator]  # JSON


def test_a_4_bit_result_that_loses_the_change_is_refused_with_what_keeps_it(
    tmp_path: Path, base: Path
) -> None:
    adapter = adapter_of(tmp_path / "adapter", base, {"kind": "nf4"})
    asked: dict[str, Any] = {"format": "merged-4bit", "into": "dequantized"}
    with pytest.raises(ExportFailed, match="rounding took away") as refused:
        export(settings(base, adapter, tmp_path / "out", **asked))
    said = str(refused.value)
    assert "--dtype" not in said
    assert "--format merged keeps it" in said
    assert "--into 16bit" in said
    export(settings(base, adapter, tmp_path / "sixteen", **asked | {"into": "16bit"}))
    export(settings(base, adapter, tmp_path / "merged"))
    # Where there are no 16-bit weights, they are no advice.
    stored = _in_nf4(base, tmp_path / "stored")
    with pytest.raises(ExportFailed, match="rounding took away") as refused:
        export(settings(stored, adapter, tmp_path / "out", **asked))
    assert "--into" not in str(refused.value)


def test_what_the_adapter_was_trained_on_and_is_not_there_is_noted(tmp_path: Path, base: Path) -> None:
    stored = _in_nf4(base, tmp_path / "stored")
    for kind, says in (("dense", "--base-16bit"), ("gptq", "give that one with --base")):
        adapter = adapter_of(tmp_path / kind, base, {"kind": kind}, 1.0)
        report = export(settings(stored, adapter, tmp_path / f"out-{kind}"))
        facts: Any = report.manifest["base"]
        assert any(says in note for note in facts["notes"])
    adapter = adapter_of(tmp_path / "same", base, {"kind": "nf4"}, 1.0)
    report = export(settings(stored, adapter, tmp_path / "out"))
    assert report.manifest["base"]["notes"] == []  # type: ignore[index]  # JSON


def test_a_model_says_how_it_is_served_and_what_another_way_costs(tmp_path: Path, base: Path) -> None:
    adapter, out = adapter_of(tmp_path / "adapter", base, {"kind": "nf4"}), tmp_path / "out"
    report = export(settings(base, adapter, out))
    held: Any = {}
    for quantization in ("auto", "none", "nf4"):
        backend = PlainBackend(torch.device("cpu"), torch.float32)
        held[quantization] = load_weights(out, backend, quantization=quantization)[2]
    assert [held[each].kind for each in held] == ["dense", "dense", "nf4"]
    assert held["auto"].notes == held["none"].notes == ()
    [note] = held["nf4"].notes
    moved: Any = report.manifest["in_nf4"]
    assert f"in NF4 its logits move by {moved['relative']:.2g}" in note
    if report.manifest["dtype"] != "bfloat16":
        narrow = load_weights(out, PlainBackend(torch.device("cpu"), torch.bfloat16))[2]
        assert "in bfloat16" in narrow.notes[0]


def test_a_merge_into_a_merged_model_and_to_4_bits(tmp_path: Path, base: Path) -> None:
    first = adapter_of(tmp_path / "first", base, {"kind": "nf4"}, 1.0)
    export(settings(base, first, tmp_path / "merged"))
    # An adapter that says nothing, on a model that is served as it is.
    second = adapter_of(tmp_path / "second", base, None, 1.0)
    report = export(settings(tmp_path / "merged", second, tmp_path / "twice"))
    assert report.manifest["into"] == "16bit"
    assert load(tmp_path / "twice").config.vocab_size == load(base).config.vocab_size
    export(settings(tmp_path / "merged", second, tmp_path / "four", format="merged-4bit"))
    assert "manylora" not in json.loads((tmp_path / "four" / "config.json").read_text())


def _in_nf4(base: Path, directory: Path) -> Path:
    """The base as transformers and bitsandbytes store it."""
    from transformers import BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load(base, quantization_config=four_bit).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("second", "says"), [("nf4", True), ("dense", False), (None, False)])
def test_one_adapter_of_several_says_what_all_of_them_say(
    tmp_path: Path, base: Path, second: str | None, says: bool
) -> None:
    held: dict[str, object] | None = None if second is None else {"kind": second}
    parts = (
        ExportPart("one", adapter_of(tmp_path / "one", base, {"kind": "nf4"}, 1.0), 0.5),
        ExportPart("two", adapter_of(tmp_path / "two", base, held, 0.9), 0.5),
    )
    export(ExportSettings(adapter=None, output=tmp_path / "out", parts=parts, format="peft"))
    assert (tmp_path / "out" / BASE_FILE).exists() is says
    report = export(ExportSettings(adapter=None, output=tmp_path / "model", base=base, parts=parts))
    facts: Any = report.manifest["base"]
    assert (facts["trained_as"] == "NF4") is says

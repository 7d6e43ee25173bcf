"""A mixture merged into its base is what is served: W + Σ wᵢ sᵢ Bᵢ Aᵢ, each part by its own rules, in any order."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from manylora.adapters.errors import AdapterError, InvalidMixture
from manylora.adapters.export import export as exporting
from manylora.adapters.export.errors import ExportFailed, ExportRefused
from manylora.adapters.export.export import export
from manylora.adapters.export.merge import MergedWeights
from manylora.adapters.export.mixture import TrainedMixture
from manylora.adapters.export.outline import outline_of
from manylora.adapters.export.settings import ExportPart, ExportSettings
from manylora.adapters.files import BASE_FILE, digest_of
from manylora.adapters.pooling import read_pooling
from manylora.adapters.reader import read_adapter
from manylora.adapters.tokenizer import load_tokenizer
from manylora.adapters.tokens import read_chat_template
from manylora.adapters.types import ModuleShape
from manylora.server.model.decoder_base import DecoderBase
from tests.adapters.export.making import MIXED, load, logits_of, make_adapter, make_base
from tests.adapters.making import pool
from tests.server.model.steps import Stream, all_logits, place, step
from tests.server.model.steps import load as load_ours

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
TOKENS = [5, 17, 300, 42, 99, 7, 230, 12, 9, 31, 250, 3]
LENGTHS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "narrow dora": {"use_dora": True, "r": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, **MIXED},
    "narrow": {"r": 3, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
}
WEIGHTS = {"plain": 0.7, "rslora": 0.3, "narrow": -1.25}


def make_parts(directory: Path, base: Path) -> tuple[ExportPart, ...]:
    for seed, (name, kind) in enumerate(KINDS.items()):
        make_adapter(directory / name, base, seed=seed, **kind)
    return tuple(ExportPart(name, directory / name, WEIGHTS[name]) for name in KINDS)


def asked(
    parts: tuple[ExportPart, ...], output: Path, base: Path | None = None, **more: Any
) -> ExportSettings:
    return ExportSettings(adapter=None, output=output, base=base, parts=parts, **more)


def theirs(base: Path, parts: tuple[ExportPart, ...]) -> Any:
    """The base with what peft says that each adapter adds, times its weight."""
    first, *more = parts
    model = PeftModel.from_pretrained(load(base), first.directory, adapter_name=first.name)
    for part in more:
        model.load_adapter(part.directory, adapter_name=part.name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for part in parts:
                    if part.name in module.lora_A:
                        module.get_base_layer().weight += part.weight * module.get_delta_weight(part.name)
    return model.unload().eval()


def served(base: Path, parts: tuple[ExportPart, ...]) -> torch.Tensor:
    """What the server computes with all parts beside the base, float32."""
    model = load_ours(base)
    modules = {path: ModuleShape(*shape) for path, shape in model.decoder.config.base_modules().items()}
    base_of = DecoderBase(model.decoder)
    weights = [
        read_adapter(part.directory, modules, max_rank=256, dtype=torch.float32, base=base_of).weights
        for part in parts
    ]
    spans = [(number, part.weight) for number, part in zip(place(model, weights), parts, strict=True)]
    stream = Stream(0, TOKENS, tuple(spans))
    step(model, [(stream, len(TOKENS))])
    return all_logits(stream)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), dtype=torch.float32)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[ExportPart, ...]:
    return make_parts(tmp_path_factory.mktemp("parts"), base)


def refusal(kind: type[AdapterError], settings: ExportSettings) -> str:
    with pytest.raises(kind) as caught:
        export(settings)
    assert not settings.output.exists()
    assert not list(settings.output.parent.glob(".partial*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_merged_mixture_is_the_sum_in_peft_and_in_the_server(
    tmp_path: Path, base: Path, parts: tuple[ExportPart, ...]
) -> None:
    report = export(asked(parts, tmp_path / "out", base))
    merged = load(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged), logits_of(theirs(base, parts)), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        found = merged(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(found, served(base, parts), rtol=1e-5, atol=1e-5)
    told: Any = report.manifest["adapter"]
    assert told["name"] == "plain:0.7+rslora:0.3+narrow:-1.25"
    assert [(part["name"], part["weight"]) for part in told["parts"]] == [
        (part.name, pytest.approx(part.weight)) for part in parts
    ]
    assert report.manifest["logits"]["relative"] < 1e-4  # type: ignore[index]  # JSON
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mixture of 3" in card


def test_the_order_of_the_parts_and_those_of_weight_0_have_no_say(
    tmp_path: Path, base: Path, parts: tuple[ExportPart, ...]
) -> None:
    make_adapter(tmp_path / "nothing", base, seed=9, r=2)
    nothing = ExportPart("nothing", tmp_path / "nothing", 0.0)
    first = export(asked(parts, tmp_path / "one", base))
    other = export(asked((nothing, *reversed(parts)), tmp_path / "two", base))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(other.manifest["adapter"]["parts"]) == len(first.manifest["adapter"]["parts"]) == 3  # type: ignore[index]  # JSON


def test_a_single_part_with_a_weight_is_that_much_of_the_adapter(
    tmp_path: Path, base: Path, parts: tuple[ExportPart, ...]
) -> None:
    half = (ExportPart("plain", parts[0].directory, 0.5),)
    export(asked(half, tmp_path / "out", base))
    torch.testing.assert_close(
        logits_of(load(tmp_path / "out")), logits_of(theirs(base, half)), rtol=1e-5, atol=1e-5
    )


def test_a_result_that_is_not_the_running_mixture_is_not_published(
    tmp_path: Path, base: Path, parts: tuple[ExportPart, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if only the first part had been written."""
    write = exporting.write_weights  # type: ignore[attr-defined]  # as export calls it
    first = TrainedMixture(parts[:1], outline_of(json.loads((base / "config.json").read_text())))

    def without_the_others(directory: Path, merged: Any, *more: Any) -> Any:
        return write(directory, MergedWeights(merged._base, first, merged._head), *more)

    monkeypatch.setattr(exporting, "write_weights", without_the_others)
    assert "differ from base + adapter" in refusal(ExportFailed, asked(parts, tmp_path / "out", base))


def each_alone(base: Path, parts: tuple[ExportPart, ...]) -> Any:
    """The base with what peft makes of each adapter alone, less the base, times its weight."""
    model = load(base)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for part in parts:
            alone = PeftModel.from_pretrained(load(base), part.directory).merge_and_unload().state_dict()
            for name, tensor in model.state_dict().items():
                tensor.add_(alone[name] - plain[name], alpha=part.weight)
    return model.eval()


@pytest.mark.parametrize("with_factors", [True, False], ids=["beside LoRA", "alone"])
def test_parts_with_lengths_of_their_own_are_merged_as_they_are_served(
    tmp_path: Path, base: Path, parts: tuple[ExportPart, ...], with_factors: bool
) -> None:
    """Each part's lengths are of the base with that part alone, whatever else is in the mixture."""
    scaled = []
    for seed, ((name, kind), weight) in enumerate(zip(LENGTHS.items(), (0.6, -1.5), strict=True), 20):
        make_adapter(tmp_path / name, base, seed=seed, strength=0.1, **kind)
        scaled.append(ExportPart(name, tmp_path / name, weight))
    mixture = (parts[0], *scaled) if with_factors else tuple(scaled)
    report = export(asked(mixture, tmp_path / "out", base))
    merged = load(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged), logits_of(each_alone(base, mixture)), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        found = merged(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(found, served(base, mixture), rtol=1e-4, atol=1e-4)
    assert report.manifest["logits"]["relative"] < 1e-4  # type: ignore[index]  # JSON
    assert report.manifest["logits"]["relative"] < report.manifest["adapter_effect"]["relative"] / 1e3  # type: ignore[index]  # JSON


@pytest.mark.parametrize(("form", "with_base"), [("peft", True), ("peft", False), ("gguf-lora", True)])
def test_no_adapter_of_factors_is_made_of_parts_with_lengths(
    tmp_path: Path, base: Path, parts: tuple[ExportPart, ...], form: str, with_base: bool
) -> None:
    make_adapter(tmp_path / "odd", base, use_dora=True)
    mixture = (parts[0], ExportPart("odd", tmp_path / "odd", 1.0))
    output = tmp_path / ("out.gguf" if form == "gguf-lora" else "out")
    said = refusal(ExportRefused, asked(mixture, output, base if with_base else None, format=form))
    assert "part 'odd' is DoRA, which gives the base's own rows other lengths" in said
    assert "--format merged makes a model of it" in said


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"modules_to_save": ["model.norm"]}, "brings model.norm.weight whole"),
        ({"target_modules": ["q_proj", "lm_head"]}, "changes "),
        ({"bias": "all"}, "brings "),
    ],
    ids=["saved", "head", "bias"],
)
@pytest.mark.parametrize("form", ["merged", "peft"])
def test_a_part_that_is_more_than_factors_is_refused_by_its_name(
    tmp_path: Path, base: Path, parts: tuple[ExportPart, ...], form: str, config: dict[str, Any], says: str
) -> None:
    make_adapter(tmp_path / "odd", base, **config)
    mixture = (parts[0], ExportPart("odd", tmp_path / "odd", 1.0))
    said = refusal(ExportRefused, asked(mixture, tmp_path / "out", base, format=form))
    assert f"part 'odd' {says}" in said


def test_a_part_that_does_not_fit_is_named(tmp_path: Path, base: Path, parts: tuple[ExportPart, ...]) -> None:
    make_adapter(tmp_path / "odd", base)
    config = json.loads((tmp_path / "odd" / "adapter_config.json").read_text())
    (tmp_path / "odd" / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    mixture = (parts[0], ExportPart("odd", tmp_path / "odd", 1.0))
    for more in ({}, {"format": "peft"}):
        assert "part 'odd'" in refusal(AdapterError, asked(mixture, tmp_path / "out", base, **more))


@pytest.mark.parametrize("own", ["template", "tokenizer", "names", "pooling"])
@pytest.mark.parametrize("form", ["merged", "peft"])
def test_parts_whose_texts_differ_are_refused_with_their_names(
    tmp_path: Path, base: Path, form: str, own: str
) -> None:
    for seed, name in enumerate(("one", "two")):
        make_adapter(tmp_path / name, base, seed=seed)
    bring(own, base, tmp_path / "two")
    if own == "pooling":
        pool(tmp_path / "one", "lasttoken")  # a part that says nothing has no say
    mixture = tuple(ExportPart(name, tmp_path / name, 1.0) for name in ("one", "two"))
    said = refusal(InvalidMixture, asked(mixture, tmp_path / "out", base, format=form))
    assert "'one'" in said
    assert "'two'" in said
    named = {"template": "chat templates", "tokenizer": "tokenizers", "names": "eos_token", "pooling": "pool"}
    assert named[own] in said
    # Alike in both, or the base's own, they are one text.
    bring(own, base, tmp_path / "one")
    export(asked(mixture, tmp_path / "both", base, format=form))


def bring(what: str, base: Path, adapter: Path) -> None:
    if what == "template":
        (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}!")
        return
    if what == "pooling":
        pool(adapter, "mean")
        return
    own: Any = load_tokenizer(base)
    if what == "names":
        name = own.convert_ids_to_tokens(5)
        (adapter / "special_tokens_map.json").write_text(json.dumps({"eos_token": name}))
        return
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["unk_token"] = None
    content["normalizer"] = {"type": "Lowercase"}
    (adapter / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("comes_first", [True, False])
def test_how_parts_pool_texts_goes_with_the_result_whichever_says_it(
    tmp_path: Path, base: Path, comes_first: bool
) -> None:
    silent, teller = tmp_path / "silent", tmp_path / "teller"
    for seed, directory in enumerate((silent, teller)):
        make_adapter(directory, base, seed=seed)
    pool(teller, "mean", "Transformer", "Pooling")
    while (digest_of(teller, 1 << 30) < digest_of(silent, 1 << 30)) is not comes_first:  # parts' order
        with (silent / BASE_FILE).open("a") as file:
            file.write(" ")
    mixture = tuple(ExportPart(each.name, each, 1.0) for each in (silent, teller))
    for form in ("merged", "peft"):
        export(asked(mixture, tmp_path / form, base, format=form))
        assert read_pooling(tmp_path / form) == "mean"
        assert (tmp_path / form / "modules.json").read_bytes() == (teller / "modules.json").read_bytes()


def test_the_text_that_all_parts_share_goes_with_the_result(tmp_path: Path, base: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        make_adapter(tmp_path / name, base, seed=seed)
        bring("template", base, tmp_path / name)
    mixture = tuple(ExportPart(name, tmp_path / name, 1.0) for name in ("one", "two"))
    for form in ("merged", "peft"):
        export(asked(mixture, tmp_path / form, base, format=form))
        assert (tmp_path / form / "chat_template.jinja").read_text() == "{{ messages[0].content }}!"


def test_the_bases_own_text_is_no_difference(tmp_path: Path, base: Path) -> None:
    """Saved again by another hand, as trainers do: the same tokenizer in other bytes, with a truncation."""
    for seed, name in enumerate(("one", "two")):
        make_adapter(tmp_path / name, base, seed=seed)
    content = json.loads((base / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "two" / "tokenizer.json").write_text(json.dumps(content))
    template = read_chat_template(base)
    assert template is not None
    (tmp_path / "two" / "chat_template.jinja").write_text(template)
    mixture = tuple(ExportPart(name, tmp_path / name, 1.0) for name in ("one", "two"))
    export(asked(mixture, tmp_path / "out", base))
    said = refusal(InvalidMixture, asked(mixture, tmp_path / "alone", format="peft"))
    assert "name it with --base" in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"combine": "svd", "rank": 4}, "is for one adapter"),
        ({"seed": 1}, "is for one adapter"),
        ({"format": "peft", "combine": "mean"}, "'mean' is no way"),
        ({"format": "peft", "combine": "cat", "rank": 4}, "cat takes no rank"),
        ({"format": "peft", "rank": 4}, "cat takes no rank"),
        ({"format": "peft", "combine": "svd"}, "svd needs the wanted rank"),
        ({"format": "peft", "combine": "svd", "rank": 0}, "rank 0"),
        ({"format": "peft", "combine": "svd", "rank": 4, "density": 0.5}, "svd takes no density"),
        ({"format": "peft", "combine": "ties"}, "ties needs a density"),
        ({"format": "peft", "combine": "ties", "density": 1.5}, "density 1.5"),
        ({"format": "peft", "combine": "ties", "density": float("nan")}, "density nan"),
        ({"format": "peft", "combine": "ties", "density": 0.5, "seed": 1}, "ties takes no seed"),
        ({"format": "peft", "combine": "dare_ties", "density": 0.5, "seed": -1}, "seed -1"),
        ({"format": "peft", "combine": "dare_ties", "density": 0.5, "rank": 2}, "dare_ties takes no rank"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    tmp_path: Path, more: dict[str, Any], says: str
) -> None:
    mixture = (ExportPart("a", tmp_path / "a", 1.0), ExportPart("b", tmp_path / "b", 1.0))
    with pytest.raises(ExportRefused, match=says):
        asked(mixture, tmp_path / "out", **more)


@pytest.mark.parametrize(
    ("weights", "places", "says"),
    [
        ((0.0, 0.0), ("a", "b"), "every weight is 0"),
        ((1.0, float("nan")), ("a", "b"), "the weight of 'two' is nan"),
        ((1.0, 1e39), ("a", "b"), "the weight of 'two' is 1e\\+39"),
        ((0.5, 0.5), ("a", "x/../a"), "are the same adapter"),
    ],
)
def test_parts_that_make_no_sense_are_refused(
    tmp_path: Path, weights: tuple[float, ...], places: tuple[str, ...], says: str
) -> None:
    (tmp_path / "x").mkdir()
    given = zip(("one", "two"), places, weights, strict=True)
    with pytest.raises(AdapterError, match=says):
        asked(
            tuple(ExportPart(name, tmp_path / where, weight) for name, where, weight in given),
            tmp_path / "out",
        )


def test_an_export_is_of_one_adapter_or_of_parts(tmp_path: Path) -> None:
    part = ExportPart("a", tmp_path / "a", 1.0)
    for adapter, parts in ((None, ()), (tmp_path / "a", (part,))):
        with pytest.raises(ExportRefused, match="give one of the two"):
            ExportSettings(adapter=adapter, output=tmp_path / "out", parts=parts)


def test_settings_go_to_another_process_and_back(tmp_path: Path) -> None:
    mixture = (ExportPart("a", tmp_path / "a", 0.5), ExportPart("b", tmp_path / "b", -1.0))
    given = asked(mixture, tmp_path / "out", format="peft", combine="svd", rank=3)
    assert ExportSettings.from_json(json.loads(json.dumps(given.to_json()))) == given

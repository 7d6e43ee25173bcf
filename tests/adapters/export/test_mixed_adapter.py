"""One adapter made of a mixture: cat is the mixture in peft and in the server, the others say how far they are."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from manylora.adapters.errors import AdapterError
from manylora.adapters.export import mixed_adapter
from manylora.adapters.export.errors import ExportFailed, ExportRefused
from manylora.adapters.export.export import export
from manylora.adapters.export.mixture import natural
from manylora.adapters.export.settings import ExportPart
from tests.adapters.export.making import load, logits_of, make_adapter, make_base
from tests.adapters.export.test_mixture import asked, make_parts, refusal, served, theirs

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), dtype=torch.float32)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[ExportPart, ...]:
    return make_parts(tmp_path_factory.mktemp("parts"), base)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[ExportPart, ...]:
    """Adapters of one rank, as peft's methods need them; the last has fewer modules."""
    directory = tmp_path_factory.mktemp("twins")
    kinds: dict[str, dict[str, Any]] = {"one": {}, "two": {}, "few": {"target_modules": ["q_proj"]}}
    for seed, (name, more) in enumerate(kinds.items()):
        make_adapter(directory / name, base, seed=seed, **more)
    return tuple(
        ExportPart(name, directory / name, weight)
        for name, weight in (("one", 0.8), ("two", -0.5), ("few", 1.5))
    )


def sums(parts: tuple[ExportPart, ...]) -> dict[str, torch.Tensor]:
    """Σ w s B A by module, from the files, in float64."""
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for path, (a, b) in pairs(part.directory).items():
            config = json.loads((part.directory / CONFIG).read_text())
            rank, alpha = len(a), config["lora_alpha"]
            for key, value in config["alpha_pattern"].items():
                alpha = value if path.endswith(f".{key}") else alpha
            scale = alpha / rank**0.5 if config["use_rslora"] else alpha / rank
            found[path] = found.get(path, torch.zeros(())) + part.weight * scale * (b @ a)
    return found


def pairs(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    tensors = {name: tensor.double() for name, tensor in load_file(directory / WEIGHTS).items()}
    ends = ".lora_A.weight", ".lora_B.weight"
    return {
        name.removeprefix("base_model.model.").removesuffix(ends[0]): (
            tensor,
            tensors[name.removesuffix(ends[0]) + ends[1]],
        )
        for name, tensor in tensors.items()
        if name.endswith(ends[0])
    }


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
def test_cat_is_the_mixture_in_peft_and_in_the_server(
    tmp_path: Path, base: Path, parts: tuple[ExportPart, ...], with_base: bool
) -> None:
    out = tmp_path / "out"
    report = export(asked(parts, out, base if with_base else None, format="peft"))
    model = PeftModel.from_pretrained(load(base), out).eval()
    torch.testing.assert_close(logits_of(model), logits_of(theirs(base, parts)), rtol=1e-5, atol=1e-5)
    alone = served(base, (ExportPart("out", out, 1.0),))
    torch.testing.assert_close(alone, served(base, parts), rtol=1e-5, atol=1e-5)
    assert report.manifest["combine"] == "cat"
    assert report.manifest["error"]["overall"] < 1e-6  # type: ignore[index]  # JSON
    ranks: Any = report.manifest["ranks"]
    # 4, a pattern's 8 and 3 in layer 1; 4 and 8 in layer 0, where the narrow one has nothing.
    assert (ranks[Q_PROJ], ranks["model.layers.0.self_attn.q_proj"]) == (15, 12)
    assert ranks["model.layers.1.mlp.up_proj"] == 4 + 3
    assert json.loads((out / "manylora_export.json").read_text()) == json.loads(json.dumps(report.manifest))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": r".*layers\.1\..*\.(q_proj|up_proj)"},
        {"target_modules": "all-linear", "rank_pattern": {"layers.1.mlp.up_proj": 3}},
    ],
    ids=["layers", "excluded", "regex", "all-linear"],
)
def test_it_targets_what_its_parts_target_and_nothing_else(
    tmp_path: Path, base: Path, config: dict[str, Any]
) -> None:
    for seed, name in enumerate(("one", "two")):
        make_adapter(tmp_path / name, base, seed=seed, **config)
    mixture = tuple(ExportPart(name, tmp_path / name, 0.5) for name in ("one", "two"))
    out = tmp_path / "out"
    export(asked(mixture, out, format="peft"))
    alone = served(base, (ExportPart("out", out, 1.0),))
    torch.testing.assert_close(alone, served(base, mixture), rtol=1e-5, atol=1e-5)
    model = PeftModel.from_pretrained(load(base), out).eval()
    torch.testing.assert_close(logits_of(model), logits_of(theirs(base, mixture)), rtol=1e-5, atol=1e-5)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert adapted == set(pairs(out)) == set(pairs(tmp_path / "one"))


def test_an_rslora_part_may_come_first(tmp_path: Path, base: Path, parts: tuple[ExportPart, ...]) -> None:
    """peft's own cat then scales all by √rank."""
    alone = (ExportPart("rslora", parts[1].directory, 0.5),)
    export(asked(alone, tmp_path / "out", format="peft"))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["use_rslora"] is False
    model = PeftModel.from_pretrained(load(base), tmp_path / "out").eval()
    torch.testing.assert_close(logits_of(model), logits_of(theirs(base, alone)), rtol=1e-5, atol=1e-5)


def test_the_order_of_the_parts_has_no_say(tmp_path: Path, parts: tuple[ExportPart, ...]) -> None:
    for name, given in (("one", parts), ("two", tuple(reversed(parts)))):
        export(asked(given, tmp_path / name, format="peft"))
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_narrower_type_is_as_far_off_as_it_says(tmp_path: Path, parts: tuple[ExportPart, ...]) -> None:
    report = export(asked(parts, tmp_path / "out", format="peft", dtype="bfloat16"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    _assert_errors_are_true(report.manifest, tmp_path / "out", parts)
    assert 1e-4 < report.manifest["error"]["overall"] < 0.01  # type: ignore[index]  # JSON


def test_svd_is_the_nearest_of_its_rank_and_says_how_near(
    tmp_path: Path, base: Path, parts: tuple[ExportPart, ...]
) -> None:
    out = tmp_path / "out"
    report = export(asked(parts, out, base, format="peft", combine="svd", rank=3))
    _assert_errors_are_true(report.manifest, out, parts)
    wanted, made = sums(parts), pairs(out)
    for path, (a, b) in made.items():
        assert len(a) == 3
        u, sizes, v = torch.linalg.svd(wanted[path], full_matrices=False)
        torch.testing.assert_close(b @ a, (u[:, :3] * sizes[:3]) @ v[:3], rtol=1e-4, atol=1e-5)
    # What the server makes of it is what peft makes of it.
    model = PeftModel.from_pretrained(load(base), out).eval()
    whole = (ExportPart("out", out, 1.0),)
    torch.testing.assert_close(logits_of(model), logits_of(theirs(base, whole)), rtol=1e-5, atol=1e-5)


def test_svd_keeps_no_more_rows_than_there_are(tmp_path: Path, parts: tuple[ExportPart, ...]) -> None:
    report = export(asked(parts, tmp_path / "out", format="peft", combine="svd", rank=64))
    assert report.manifest["error"]["overall"] < 1e-6  # type: ignore[index]  # JSON
    assert report.manifest["rank"] == 15


def test_svd_makes_one_adapter_smaller(tmp_path: Path, parts: tuple[ExportPart, ...]) -> None:
    alone = (ExportPart("plain", parts[0].directory, 1.0),)
    report = export(asked(alone, tmp_path / "out", format="peft", combine="svd", rank=2))
    _assert_errors_are_true(report.manifest, tmp_path / "out", alone)
    assert report.manifest["rank"] == 2


def _assert_errors_are_true(manifest: Any, directory: Path, parts: tuple[ExportPart, ...]) -> None:
    wanted, made = sums(parts), pairs(directory)
    assert set(wanted) == set(made) == set(manifest["error"]["modules"])
    off = {path: torch.linalg.matrix_norm(b @ a - wanted[path]).item() for path, (a, b) in made.items()}
    size = {path: torch.linalg.matrix_norm(each).item() for path, each in wanted.items()}
    for path, found in manifest["error"]["modules"].items():
        assert found == pytest.approx(off[path] / size[path], rel=1e-3, abs=1e-7)
    overall = (sum(x**2 for x in off.values()) / sum(x**2 for x in size.values())) ** 0.5
    assert manifest["error"]["overall"] == pytest.approx(overall, rel=1e-3)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_pefts_methods_give_what_peft_gives(
    tmp_path: Path, base: Path, twins: tuple[ExportPart, ...], method: str
) -> None:
    out = tmp_path / "out"
    seed: dict[str, Any] = {} if method == "ties" else {"seed": 7}
    report = export(asked(twins, out, format="peft", combine=method, density=0.6, **seed))
    order = [part for digest, part in sorted((_digest(part), part) for part in twins)]
    model = PeftModel.from_pretrained(load(base), order[0].directory, adapter_name=order[0].name)
    for part in order[1:]:
        model.load_adapter(part.directory, adapter_name=part.name)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    tuner: Any = model.base_model
    torch.manual_seed(7)
    made = pairs(out)
    assert set(made) == set(layers)
    for path in sorted(layers, key=natural):
        expected = tuner._generalized_task_arithmetic_weighted_adapter(
            method, [part.name for part in order], [part.weight for part in order], layers[path], 0.6, "total"
        )
        for found, tensor in zip(made[path], expected, strict=True):
            torch.testing.assert_close(found.float(), tensor, rtol=0, atol=0)
    _assert_errors_are_true(report.manifest, out, twins)


def _digest(part: ExportPart) -> str:
    from manylora.adapters.files import digest_of

    return digest_of(part.directory, 1 << 30)


def test_a_seed_makes_what_is_random_the_same_again(tmp_path: Path, twins: tuple[ExportPart, ...]) -> None:
    state = torch.get_rng_state()
    files = []
    for number, seed in enumerate((1, 1, 2, None, 0)):
        torch.rand(number + 1)
        export(
            asked(twins, tmp_path / str(number), format="peft", combine="dare_linear", density=0.5, seed=seed)
        )
        files.append((tmp_path / str(number) / WEIGHTS).read_bytes())
    assert files[0] == files[1] != files[2]
    assert files[3] == files[4] != files[0]
    torch.set_rng_state(state)
    before = torch.rand(1)
    torch.set_rng_state(state)
    export(asked(twins, tmp_path / "last", format="peft", combine="dare_linear", density=0.5, seed=3))
    assert torch.rand(1) == before


def test_pefts_methods_need_parts_of_one_rank(tmp_path: Path, parts: tuple[ExportPart, ...]) -> None:
    said = refusal(ExportRefused, asked(parts, tmp_path / "out", format="peft", combine="ties", density=0.5))
    assert "one rank" in said
    assert "cat or svd" in said


def test_one_adapter_is_nothing_to_combine_by_peft(tmp_path: Path, twins: tuple[ExportPart, ...]) -> None:
    zero = ExportPart("two", twins[1].directory, 0.0)
    with pytest.raises(ExportRefused, match="two adapters or more"):
        asked((twins[0], zero), tmp_path / "out", format="peft", combine="ties", density=0.5)


def test_an_archive_of_it_holds_what_the_directory_would(
    tmp_path: Path, twins: tuple[ExportPart, ...]
) -> None:
    export(asked(twins, tmp_path / "out", format="peft"))
    export(asked(twins, tmp_path / "out.tar.gz", format="peft", adapter_name="team/mixed"))
    with tarfile.open(tmp_path / "out.tar.gz") as tar:
        names = {name.removeprefix("team_mixed/") for name in tar.getnames()}
        weights = tar.extractfile(f"team_mixed/{WEIGHTS}")
        assert weights is not None
        assert weights.read() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert names == {path.name for path in (tmp_path / "out").iterdir()}


def test_what_is_not_the_sum_is_not_published(
    tmp_path: Path, twins: tuple[ExportPart, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = mixed_adapter.save_file  # type: ignore[attr-defined]  # as it is called there

    def damaged(tensors: dict[str, torch.Tensor], *more: Any, **named: Any) -> None:
        tensors[next(iter(tensors))][0] *= 1.001
        save(tensors, *more, **named)

    monkeypatch.setattr(mixed_adapter, "save_file", damaged)
    assert "from the sum of its parts" in refusal(ExportFailed, asked(twins, tmp_path / "out", format="peft"))
    assert "from the sum" in refusal(ExportFailed, asked(twins, tmp_path / "out.zip", format="peft"))


def test_overflow_is_named(tmp_path: Path, twins: tuple[ExportPart, ...]) -> None:
    large = tuple(ExportPart(part.name, part.directory, 1e38) for part in twins)
    said = refusal(ExportFailed, asked(large, tmp_path / "out", format="peft", dtype="float16"))
    assert "overflows torch.float16" in said


def test_parts_for_different_bases_are_told_apart(
    tmp_path: Path, base: Path, twins: tuple[ExportPart, ...]
) -> None:
    other = make_base(tmp_path / "other", "llama")
    make_adapter(tmp_path / "theirs", other, seed=3)
    mixture = (twins[0], ExportPart("theirs", tmp_path / "theirs", 1.0))
    said = refusal(AdapterError, asked(mixture, tmp_path / "out", format="peft"))
    assert "'theirs'" in said or "different bases" in said
    # The same base in two places is one once it is named.
    config = tmp_path / "theirs" / CONFIG
    make_adapter(tmp_path / "again", base, seed=4)
    config = tmp_path / "again" / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "elsewhere"}))
    mixture = (twins[0], ExportPart("again", tmp_path / "again", 1.0))
    said = refusal(ExportRefused, asked(mixture, tmp_path / "out", format="peft"))
    assert "elsewhere" in said
    assert "--base" in said
    export(asked(mixture, tmp_path / "out", base, format="peft", base_name="hub/base"))
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == "hub/base"


@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["model.norm"]}, {"target_modules": ["embed_tokens"]}]
)
def test_more_than_factors_is_refused_without_a_base_too(
    tmp_path: Path, base: Path, twins: tuple[ExportPart, ...], config: dict[str, Any]
) -> None:
    make_adapter(tmp_path / "odd", base, **config)
    mixture = (twins[0], ExportPart("odd", tmp_path / "odd", 1.0))
    assert "part 'odd'" in refusal(ExportRefused, asked(mixture, tmp_path / "out", format="peft"))

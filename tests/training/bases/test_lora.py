"""LoRA on every kind of base: where it goes, how it starts, what is refused, and what the server makes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer

from manylora.adapters.errors import UnsupportedAdapter
from manylora.server.config import ServeSettings
from manylora.server.model.families import FAMILIES as SERVED
from manylora.training.bases.initial import Residual
from manylora.training.bases.lora import LoraSettings, attach, attach_notes, lora_parameter_groups, servable
from manylora.training.bases.save import load_adapter, save_adapter
from manylora.training.bases.servable import SERVED_FAMILIES, SERVER_RANK
from manylora.training.errors import InvalidArgument
from tests.training.bases.making import FAMILIES, IDS, load, write_dense
from tests.training.bases.serving import MAX_RANK, read_for, served_logits

KINDS = ("dense", "nf4", "gptq", "awq")
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def stir(model: PeftModel, strength: float = 0.02) -> None:
    """Move every trained value, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * strength)


def adapted(directories: dict[str, Path], kind: str, lora: LoraSettings) -> tuple[Any, PeftModel]:
    base = load(directories[kind], q_lora=kind == "nf4")
    torch.manual_seed(0)
    return base, attach(base, lora)


METHODS = {
    "lora": LoraSettings(r=4),
    "rslora": LoraSettings(r=4, use_rslora=True),
    "gaussian": LoraSettings(r=4, init="gaussian"),
    "orthogonal": LoraSettings(r=4, init="orthogonal"),
    "pissa": LoraSettings(r=4, init="pissa"),
    "pissa-rslora": LoraSettings(r=4, init="pissa_niter_8", use_rslora=True),
    "olora": LoraSettings(r=4, init="olora"),
    "pissa-beyond-the-matrix": LoraSettings(r=40, init="pissa_niter_2"),
    "olora-beyond-the-matrix": LoraSettings(r=40, init="olora"),
    "loftq": LoraSettings(r=4, init="loftq"),
    "dora": LoraSettings(r=4, use_dora=True),
    "bias": LoraSettings(r=4, bias="all"),
    "head": LoraSettings(r=4, modules_to_save=("lm_head",)),
    "embedding": LoraSettings(r=4, targets=("q_proj", "embed_tokens")),
}
STARTS_ELSEWHERE = ("loftq",)


def possible(kind: str, method: str) -> bool:
    return (method != "loftq" or kind == "nf4") and (method != "orthogonal" or kind == "dense")


CASES = [(kind, method) for kind in KINDS for method in METHODS if possible(kind, method)]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_every_method_starts_trains_and_is_served_or_refused_as_was_said(
    directories: dict[str, Path], kind: str, method: str, tmp_path: Path
) -> None:
    lora = METHODS[method]
    base = load(directories[kind], q_lora=kind == "nf4")
    said = servable(base, lora)
    before = logits(base.model)
    model = attach(base, lora)
    if method not in STARTS_ELSEWHERE:
        torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5)
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert torch.isfinite(loss)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all(each.dtype == torch.float32 for each in trained.values())
    assert all(each.grad is not None and torch.isfinite(each.grad).all() for each in trained.values())
    stir(model)
    save_adapter(model, tmp_path)
    if not said.yes:
        with pytest.raises(UnsupportedAdapter):
            read_for(base, tmp_path)
        return
    read_for(base, tmp_path)
    served = served_logits(base, tmp_path, IDS[0].tolist())
    torch.testing.assert_close(served, logits(model)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["pissa", "pissa-rslora", "olora", "loftq", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "gptq"])
def test_what_was_saved_loads_into_peft_and_into_the_run(
    directories: dict[str, Path], kind: str, method: str, tmp_path: Path
) -> None:
    if not possible(kind, method):
        return
    base, model = adapted(directories, kind, METHODS[method])
    stir(model)
    expected = logits(model)
    save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(load(base.directory, q_lora=kind == "nf4").model, tmp_path)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-5)
    _, resumed = adapted(directories, kind, METHODS[method])
    for layer in resumed.modules():
        if isinstance(layer, Residual):  # as if another machine's SVD had other signs
            layer.start_a.data.neg_()
            layer.start_b.data.neg_()
    load_adapter(resumed, tmp_path)
    assert torch.equal(logits(resumed), expected)


def test_loftq_starts_nearer_to_the_16_bit_model(directories: dict[str, Path]) -> None:
    whole = logits(load(directories["dense"]).model)
    plain = load(directories["nf4"], q_lora=True)
    quantised = logits(plain.model)
    started = logits(attach(plain, LoraSettings(r=16, init="loftq")))
    assert (started - whole).norm() < 0.9 * (quantised - whole).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_blocks_by_default(family: str, tmp_path: Path) -> None:
    base = load(write_dense(tmp_path / family, family, tied=family != "llama"))
    model = attach(base, LoraSettings(r=2))
    assert set(model.peft_config["default"].target_modules) == SEVEN
    assert model.peft_config["default"].base_model_name_or_path == base.name
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_the_first_qwens_names_mean_this_familys(directories: dict[str, Path]) -> None:
    base = load(directories["gptq"])
    [targets, translated] = attach_notes(base, LoraSettings(targets=("c_attn", "c_proj", "w1", "w2")))
    assert all(name in targets for name in SEVEN)
    assert "are here q_proj" in translated
    [targets, translated] = attach_notes(base, LoraSettings(targets=("c_attn", "down_proj")))
    assert targets == "LoRA on q_proj, k_proj, v_proj, down_proj"
    assert "c_attn → q_proj, k_proj, v_proj" in translated


@pytest.mark.parametrize(
    ("kind", "lora", "says"),
    [
        ("dense", lambda: LoraSettings(targets=("wq",)), "no module 'wq'.*q_proj.*down_proj"),
        ("dense", lambda: LoraSettings(init="loftq"), "add --q_lora"),
        ("gptq", lambda: LoraSettings(init="loftq"), "hold GPTQ only"),
        ("nf4", lambda: LoraSettings(init="orthogonal"), "needs a 16-bit base"),
        ("dense", lambda: LoraSettings(init="olora", targets=("lm_head",)), "not for lm_head"),
        ("dense", lambda: LoraSettings(init="pissa", use_dora=True), "not with pissa"),
        ("dense", lambda: LoraSettings(init="pissa_niter_0"), "not one of default"),
        ("dense", lambda: LoraSettings(init="kaiming"), "not one of default"),
        ("dense", lambda: LoraSettings(r=0), "whole number from 1"),
        ("dense", lambda: LoraSettings(alpha=0), "above zero"),
        ("dense", lambda: LoraSettings(dropout=1), "share"),
        ("dense", lambda: LoraSettings(init="orthogonal", r=3), "even rank"),
        ("dense", lambda: LoraSettings(bias="some"), "none, all, lora_only"),  # type: ignore[arg-type]
        ("dense", lambda: LoraSettings(modules_to_save=("embd",)), "no module 'embd'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    directories: dict[str, Path], kind: str, lora: Callable[[], LoraSettings], says: str
) -> None:
    with pytest.raises(InvalidArgument, match=says) as refused:
        attach(load(directories[kind], q_lora=kind == "nf4"), lora())
    assert "\n" not in str(refused.value)


def test_factors_that_hold_the_base_get_no_dropout(directories: dict[str, Path]) -> None:
    base, model = adapted(directories, "dense", LoraSettings(r=4, init="pissa", dropout=0.5))
    assert model.peft_config["default"].lora_dropout == 0
    assert any("no dropout" in note for note in attach_notes(base, LoraSettings(init="pissa")))


def test_what_the_server_needs_is_said(directories: dict[str, Path]) -> None:
    base = load(directories["nf4"], q_lora=True)
    said = servable(base, LoraSettings(r=200, init="pissa"))
    assert said.yes
    assert "--max-rank 400" in said.because
    assert "serve its base with" not in said.because, "both sides quantise alike by default"
    double = load(directories["nf4"], q_lora=True, double_quant=True)
    assert "serve its base with --double-quant" in servable(double, LoraSettings()).because
    dense = servable(load(directories["dense"]), LoraSettings())
    assert "serve its base with --quantization none" in dense.because
    assert said.sentence().startswith("servable as an adapter: yes, because")
    assert ServeSettings.model_fields["max_rank"].default == SERVER_RANK == MAX_RANK
    assert sorted(SERVED) == sorted(SERVED_FAMILIES)


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_groups_are_those_of_peft(directories: dict[str, Path], ratio: float | None) -> None:
    _, model = adapted(directories, "dense", LoraSettings(r=4, use_dora=True))
    ours = lora_parameter_groups(model, 1e-3, 0.1, ratio)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio or 1.0, loraplus_weight_decay=0.1
    )

    def rates(groups: Any) -> dict[int, float]:
        return {id(each): group["lr"] for group in groups for each in group["params"]}

    matrices = {id(each) for each in model.parameters() if each.requires_grad and each.ndim == 2}
    expected = rates(theirs.param_groups)
    assert rates(ours).keys() == expected.keys()
    assert {key: rates(ours)[key] for key in matrices} == {key: expected[key] for key in matrices}
    for group in ours:
        assert {each.ndim for each in group["params"]} <= ({2} if group["weight_decay"] else {1})

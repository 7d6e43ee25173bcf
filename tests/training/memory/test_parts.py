"""Each part of a plan against what it counts, so that none can be a fifth too low behind the others' backs."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manylora.loadtest.material.checkpoints import BaseShape, write_base
from manylora.training.bases.load import load_base
from manylora.training.bases.lora import LoraSettings, attach
from manylora.training.bases.types import Base, BaseSettings
from manylora.training.loop.loss import trained_token_loss
from manylora.training.loop.snapshot import Snapshot
from manylora.training.memory.find import read_shape
from manylora.training.memory.plan import GIB, LOGIT_BYTES, layer_bytes, plan
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape
from manylora.training.memory.trial import _AsPrepared
from tests.training.memory.test_remedies import QWEN25_7B

SMALL = BaseShape("qwen2", 2000, 256, 704, 2, 4, 2, 512)
RUN = RunShape(seq=96, rank=16, device="cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), SMALL, dtype=torch.bfloat16)


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def planned(directory: Path, run: RunShape) -> dict[str, float]:
    """The plan's parts in bytes."""
    return {name: size * GIB for name, size in plan(read_shape(str(directory)), run).parts.items()}


def base_of(directory: Path) -> Base:
    return load_base(BaseSettings(str(directory), dtype="bf16"))


def matrices(base: Base) -> list[nn.Module]:
    return [
        module
        for path, module in base.model.named_modules()
        if path.endswith("_proj") and isinstance(module.weight, Tensor)
    ]


def test_weights_and_embeddings_in_16_bits(directory: Path) -> None:
    base, parts = base_of(directory), planned(directory, RUN)
    layers = nbytes(each.weight for each in matrices(base))  # type: ignore[misc]
    assert parts["weights"] == layers
    assert parts["embeddings"] == nbytes(base.model.parameters()) - layers


@pytest.mark.parametrize("double", [False, True])
def test_weights_in_nf4(directory: Path, double: bool) -> None:
    base = load_base(BaseSettings(str(directory), q_lora=True, dtype="bf16", double_quant=double))

    def held(module: Any) -> list[Tensor]:
        state = module.weight.quant_state
        return [module.weight.data, state.absmax, *([state.state2.absmax] if double else [])]

    layers = nbytes(tensor for each in matrices(base) for tensor in held(each))
    parts = planned(directory, RunShape("qlora", seq=96, rank=16, device="cpu", double_quant=double))
    assert parts["weights"] == pytest.approx(layers, rel=0.005)


OPTIMISERS: Mapping[str, Callable[..., Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


ADAPTERS = {
    "two targets": LoraSettings(r=16, targets=("q_proj", "v_proj")),
    "all": LoraSettings(r=16),
    "ranks of their own": LoraSettings(
        r=16, rank_pattern={"down_proj": 40, r"layers\.1\..*_proj": 24, "model.layers.0.mlp.up_proj": 4}
    ),
    "paths": LoraSettings(
        r=16, targets=("layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj", "o_proj")
    ),
    "DoRA": LoraSettings(r=16, use_dora=True),
}


def asked(lora: LoraSettings) -> RunShape:
    """What a plan is told of an adapter."""
    return RunShape(
        seq=96,
        rank=lora.r,
        device="cpu",
        targets=lora.targets,
        dropout=lora.used_dropout,
        rank_pattern=tuple(lora.rank_pattern.items()),
        use_dora=lora.use_dora,
        starts_from_base=lora.starts_from_base,
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw_torch", kind) for kind in ADAPTERS] + [(each, "all") for each in OPTIMISERS][1:],
)
def test_what_is_held_for_each_trained_value(directory: Path, name: str, kind: str) -> None:
    """Adapters, gradients, the optimiser's state, and the last good state of them."""
    run = replace(asked(ADAPTERS[kind]), optim=name)
    parts = planned(directory, run)
    base = base_of(directory)
    model = attach(base, ADAPTERS[kind])
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = OPTIMISERS[name](trained, lr=1e-3)
    ids = torch.arange(96)[None]
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    trained_token_loss(model, inputs)[0].backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    values = nbytes(trained)
    assert {each.dtype for each in trained} == {torch.float32}
    factors = [each for path, each in model.named_parameters() if "lora_A" in path or "lora_B" in path]
    assert parts["adapters"] == values + nbytes(factors) / 2, "and autocast's copies, half as wide"
    assert parts["gradients"] == nbytes(each.grad for each in trained if each.grad is not None)
    states = [each for state in optimizer.state.values() for each in state.values() if each.dim()]
    assert parts.get("optimizer", 0.0) == nbytes(states)
    snapshot = Snapshot.take(1, model, optimizer)
    kept = [each for state in snapshot.states.values() for each in state.values() if isinstance(each, Tensor)]
    kept = [*snapshot.values.values(), *(each for each in kept if each.dim())]
    assert parts["rollback"] == nbytes(kept)
    on_a_gpu = plan(read_shape(str(directory)), replace(run, device="cuda"))
    assert "rollback" not in on_a_gpu.parts


def test_a_start_from_the_base_stays_beside_the_factors(directory: Path) -> None:
    base, lora = base_of(directory), LoraSettings(r=16, init="olora")
    model = attach(base, lora)
    factors = [each for each in model.parameters() if each.requires_grad]
    start = [each for path, each in model.named_parameters() if ".start_" in path]
    parts, plain = (
        planned(directory, asked(lora)),
        planned(directory, replace(asked(lora), starts_from_base=False)),
    )
    assert parts["adapters"] == 1.5 * nbytes(factors) + nbytes(start)
    assert parts["adapters"] - plain["adapters"] == nbytes(start) > 0
    assert (parts["gradients"], parts["optimizer"]) == (plain["gradients"], plain["optimizer"])


@pytest.mark.parametrize(
    ("lora", "checkpointing", "method"),
    [
        (LoraSettings(r=16), False, "lora"),
        (LoraSettings(r=16), True, "lora"),
        (LoraSettings(r=256, init="olora"), False, "lora"),
        (LoraSettings(r=16, use_dora=True), False, "lora"),
        (LoraSettings(r=16, use_dora=True), False, "qlora"),
        (LoraSettings(r=16, use_dora=True, dropout=0.0), False, "lora"),
        (LoraSettings(r=16, rank_pattern={"gate_proj": 256, "layers.1.mlp.down_proj": 512}), False, "lora"),
    ],
)
def test_what_layers_keep(directory: Path, lora: LoraSettings, checkpointing: bool, method: str) -> None:
    base = load_base(BaseSettings(str(directory), q_lora=method == "qlora", dtype="bf16"))
    model: Any = attach(base, lora)
    if checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    weights = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
    kept: list[weakref.ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.append(weakref.ref(tensor))
        return tensor

    ids = torch.arange(384)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prepared = _AsPrepared(model.base_model.model.model, lambda: torch.autocast("cpu", torch.bfloat16))
        out = prepared(input_ids=ids, use_cache=False)
    saved = [each for each in (reference() for reference in kept) if each is not None]
    assert out is not None, "the graph is there, and with it what it saved"
    # Autocast's copies of the factors are counted with the adapters; those of a frozen start are made at each pass.
    factors = {tuple(each.shape) for each in model.parameters() if each.requires_grad}
    factors |= {shape[::-1] for shape in factors}
    activations = [each for each in saved if not (each.requires_grad and tuple(each.shape) in factors)]
    run = replace(asked(lora), method=method, seq=384, gradient_checkpointing=checkpointing)
    assert planned(directory, run)["activations"] == pytest.approx(nbytes(activations), rel=0.1)


def test_logits(directory: Path) -> None:
    """float32 log-probabilities, their gradient, and that of the logits, of tokens with a loss."""
    parts = planned(directory, RunShape(seq=96, batch=3, trained_share=0.5, device="cpu"))
    assert parts["logits"] == LOGIT_BYTES * 0.5 * 96 * 3 * SMALL.vocab_size


def test_a_gpus_step_is_as_long_as_all_that_is_trained() -> None:
    """Adam's for-each kernels make a float32 list of it; what activations and logits have left by then is free."""
    run = RunShape(seq=16, train_embeddings=True, gradient_checkpointing=True)
    parts = plan(QWEN25_7B, run).parts
    trained = parts["gradients"]  # 4 bytes each, as the temporaries
    freed = parts["activations"] + parts["logits"] + parts.get("layer", 0.0)
    assert parts["step"] == pytest.approx(trained - freed)
    assert "step" not in plan(QWEN25_7B, RunShape(seq=4096)).parts


def test_a_quantised_layer_is_unpacked_one_matrix_at_a_time() -> None:
    """The largest one, in the run's dtype; GPTQ by way of float32."""
    run = RunShape(seq=1, rank=1)
    gptq = replace(QWEN25_7B, quantization="gptq")
    bits = {}
    for name, shape, method in (
        ("16", QWEN25_7B, "lora"),
        ("nf4", QWEN25_7B, "qlora"),
        ("gptq", gptq, "qlora"),
    ):
        parts = plan(shape, replace(run, method=method)).parts
        bits[name] = (parts.get("layer", 0.0) + parts["logits"]) * GIB
    matrix = 3584 * 18944
    assert bits["nf4"] - bits["16"] == pytest.approx(2 * matrix, rel=0.02)
    assert bits["gptq"] - bits["nf4"] == pytest.approx(11 * matrix)


def test_a_mask_is_for_rows_of_different_lengths() -> None:
    """It is seq² for each row, and k and v are repeated for every query head under it."""
    shape = ModelShape("llama", 64, 64, 1, 8, 8, 8, 16, True)
    one, two = (plan(shape, RunShape(seq=4096, batch=batch, rank=1)).parts for batch in (1, 2))
    assert (two["layer"] - 2 * one["layer"]) * GIB == pytest.approx(3 * 2 * 4096**2, rel=0.01)
    grouped = ModelShape("llama", 64, 64, 1, 8, 2, 8, 16, True)
    alone, packed = (
        plan(grouped, RunShape(seq=4096, rank=1, packing=packing)).parts["activations"] * GIB
        for packing in (False, True)
    )
    assert packed - alone == pytest.approx(4096 * 2 * 2 * (64 - 16))


def test_what_is_no_tensor() -> None:
    """Measured figures, pinned: loadtest/checks/memory_table.py measures them again."""
    on_a_gpu = plan(QWEN25_7B, RunShape()).parts
    assert on_a_gpu["context"] == 0.9
    assert not {"kernels", "allocator"} & set(on_a_gpu)
    short = RunShape(seq=64, device="cpu")
    parts = plan(QWEN25_7B, short).parts
    assert (parts["context"], parts["kernels"]) == (0.55, 0.0625)
    small = 0.4 * parts["activations"] + 1.2 * layer_bytes(QWEN25_7B, short) / GIB
    assert parts["allocator"] == pytest.approx(small)
    assert "kernels" not in plan(QWEN25_7B, replace(short, dtype="fp32")).parts
    # Blocks of 32 MiB and above go back to the system: those of the MLP's width first.
    longer = plan(QWEN25_7B, replace(short, seq=1024)).parts
    share = 3584 / (3584 + 18944)
    holes = 0.4 * longer["activations"] + 1.2 * layer_bytes(QWEN25_7B, replace(short, seq=1024)) / GIB
    assert longer["allocator"] == pytest.approx(share * holes)
    assert "allocator" not in plan(QWEN25_7B, replace(short, seq=4096)).parts

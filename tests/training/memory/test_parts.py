"""Each part of a plan against what it counts, so that none can be a fifth too low behind the others' backs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manylora.loadtest.checkpoints import BaseShape, write_base
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


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ()])
def test_what_is_held_for_each_trained_value(directory: Path, name: str, targets: tuple[str, ...]) -> None:
    """Adapters, gradients, the optimiser's state, and the last good state of them."""
    run = RunShape(seq=96, rank=16, device="cpu", optim=name, targets=targets)
    parts = planned(directory, run)
    base = base_of(directory)
    model = attach(base, LoraSettings(r=16, targets=targets or ("c_attn", "c_proj", "w1", "w2")))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = OPTIMISERS[name](trained, lr=1e-3)
    ids = torch.arange(96)[None]
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    trained_token_loss(model, inputs)[0].backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    values = nbytes(trained)
    assert {each.dtype for each in trained} == {torch.float32}
    assert parts["adapters"] == 1.5 * values, "and autocast's copies, half as wide"
    assert parts["gradients"] == nbytes(each.grad for each in trained if each.grad is not None)
    states = [each for state in optimizer.state.values() for each in state.values() if each.dim()]
    assert parts.get("optimizer", 0.0) == nbytes(states)
    snapshot = Snapshot.take(1, model, optimizer)
    kept = [each for state in snapshot.states.values() for each in state.values() if isinstance(each, Tensor)]
    kept = [*snapshot.values.values(), *(each for each in kept if each.dim())]
    assert parts["rollback"] == nbytes(kept)
    on_a_gpu = plan(read_shape(str(directory)), RunShape(seq=96, rank=16, optim=name, targets=targets))
    assert "rollback" not in on_a_gpu.parts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_layers_keep(directory: Path, checkpointing: bool) -> None:
    base = base_of(directory)
    model: Any = attach(base, LoraSettings(r=16, dropout=0.05, targets=("c_attn", "c_proj", "w1", "w2")))
    if checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    weights = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.append(tensor)
        return tensor

    ids = torch.arange(384)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prepared = _AsPrepared(model.base_model.model.model, lambda: torch.autocast("cpu", torch.bfloat16))
        prepared(input_ids=ids, use_cache=False)
    # Autocast's copies of the factors are counted with the adapters.
    factors = {tuple(each.shape) for each in model.parameters() if each.requires_grad}
    activations = [each for each in kept if tuple(each.shape) not in factors | {x[::-1] for x in factors}]
    run = RunShape(seq=384, rank=16, device="cpu", gradient_checkpointing=checkpointing)
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
    """Measured figures, pinned: loadtest/memory_table.py measures them again."""
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

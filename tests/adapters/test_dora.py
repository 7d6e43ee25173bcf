"""DoRA adapters: what they make of a base is what peft makes of it, and what doesn't go together is refused by name."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.reader import LoadedAdapter, inspect_adapter, read_adapter
from tests.adapters.making import HIDDEN, KV, MODULES, factors, write

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
LENGTH = f"{Q0}.lora_magnitude_vector"
WEIGHTS = "adapter_model.safetensors"


class Base:
    """A base by its rows' lengths."""

    def __init__(self, norms: Callable[[str, Tensor, Tensor], Tensor]) -> None:
        self.row_norms = norms

    def bias(self, path: str) -> Tensor:
        raise AssertionError("nobody asked for biases")


def base_of(model: LlamaForCausalLM) -> Base:
    weights = {name.removesuffix(".weight"): tensor.detach() for name, tensor in model.named_parameters()}
    return Base(lambda path, a, b: torch.linalg.vector_norm(weights[path] + b @ a, dim=1))


ONES = Base(lambda path, a, b: torch.ones(len(b)))


def read(directory: Path, base: Base | None = ONES, dtype: torch.dtype = torch.float32) -> LoadedAdapter:
    return read_adapter(directory, MODULES, max_rank=16, dtype=dtype, base=base)


def save_dora(base: LlamaForCausalLM, directory: Path, **fields: object) -> PeftModel:
    """Train nothing, but have all that training would change differ from the start."""
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        use_dora=True,
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | fields,
    )
    model = get_peft_model(copy.deepcopy(base), config)
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory, save_embedding_layers=False)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2, r".*\.0\..*q_proj": 7}},
        {"target_modules": ["k_proj", "o_proj"], "alpha_pattern": {"layers.1.self_attn.o_proj": 32}},
        {"exclude_modules": ["down_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_a_scaled_base_and_its_pairs_are_the_matrix_that_peft_merges(
    base: LlamaForCausalLM, tmp_path: Path, fields: dict[str, object]
) -> None:
    model = save_dora(base, tmp_path, **fields)
    weights = read(tmp_path, base_of(base)).weights
    before = dict(base.named_parameters())
    after = dict(model.merge_and_unload().named_parameters())
    assert weights.gains.keys() == weights.pairs.keys()
    for path, gain in weights.gains.items():
        name = f"{path}.weight"
        ours = before[name] * (1 + gain)[:, None] + weights.pairs[path].b.T @ weights.pairs[path].a
        torch.testing.assert_close(ours, after[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(after[name], before[name])
    ranks = inspect_adapter(tmp_path, MODULES, max_rank=16).rank_by_module()
    assert ranks == weights.rank_by_module()
    largest: dict[str, int] = {}
    for path, pair in weights.pairs.items():
        module = path.rsplit(".", 1)[-1]
        largest[module] = max(largest.get(module, 0), len(pair.a))
    assert ranks == {module: rank + 1 for module, rank in largest.items()}


def dora(directory: Path, **tensors: Tensor) -> Path:
    lengths = {
        name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(HIDDEN if "q_proj" in name else KV)
        for name in factors()
        if "lora_A" in name
    }
    return write(directory, tensors={**factors(), **lengths, **tensors}, changes={"use_dora": True})


def change(directory: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    how(tensors)
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("name", ["lora_magnitude_vector.default.weight", "lora_magnitude_vector.default"])
def test_lengths_may_be_named_as_a_models_state_dict_does(tmp_path: Path, name: str) -> None:
    """As peft names them now, and as it did before."""
    dora(tmp_path)
    expected = read(tmp_path).weights.gains
    change(
        tmp_path,
        lambda tensors: [
            tensors.update({key.replace("lora_magnitude_vector", name): tensors.pop(key)})
            for key in list(tensors)
            if "magnitude" in key
        ],
    )
    found = read(tmp_path).weights.gains
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path], gain) for path, gain in expected.items())


@pytest.mark.parametrize(
    ("how", "said", "tensor"),
    [
        (lambda tensors: tensors.pop(LENGTH), "missing", LENGTH),
        (lambda tensors: tensors.update({LENGTH: torch.ones(8)}), "shape", LENGTH),
        (lambda tensors: tensors.update({LENGTH: torch.full((HIDDEN,), torch.nan)}), "NaN", LENGTH),
        (lambda tensors: tensors.pop(f"{Q0}.lora_B.weight"), "missing", f"{Q0}.lora_B.weight"),
    ],
    ids=["missing", "a wrong shape", "NaN", "no B"],
)
def test_what_is_not_whole_is_refused(
    tmp_path: Path, how: Callable[[dict[str, Tensor]], object], said: str, tensor: str
) -> None:
    dora(tmp_path)
    change(tmp_path, how)
    with pytest.raises(InvalidAdapter, match=said) as caught:
        read(tmp_path)
    assert caught.value.tensor == tensor


def test_lengths_without_use_dora_are_refused(tmp_path: Path) -> None:
    """Without them it would be another adapter."""
    dora(tmp_path)
    write(tmp_path, tensors=load_file(tmp_path / WEIGHTS), changes={"use_dora": False})
    with pytest.raises(InvalidAdapter, match="use_dora is missing there, or false"):
        read(tmp_path)


def test_use_dora_without_lengths_is_refused(tmp_path: Path) -> None:
    write(tmp_path, changes={"use_dora": True})
    with pytest.raises(InvalidAdapter, match="missing"):
        read(tmp_path)


def test_a_row_of_no_length_is_refused(tmp_path: Path) -> None:
    dora(tmp_path)
    with pytest.raises(InvalidAdapter, match="no finite length") as caught:
        read(tmp_path, Base(lambda path, a, b: torch.zeros(len(b))))
    assert caught.value.tensor == LENGTH


def test_a_gain_that_overflows_the_served_type_is_refused(tmp_path: Path) -> None:
    dora(tmp_path, **{f"{Q0}.lora_B.weight": torch.zeros(HIDDEN, 4), LENGTH: torch.full((HIDDEN,), 1e6)})
    assert float(read(tmp_path).weights.gains["model.layers.0.self_attn.q_proj"][0]) == pytest.approx(1e6)
    with pytest.raises(InvalidAdapter, match="overflows"):
        read(tmp_path, dtype=torch.float16)


def test_without_the_base_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match="use_dora"):
        read(dora(tmp_path), None)

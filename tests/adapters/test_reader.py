"""Reading adapters: equal to peft where they fit, refused with the file and the tensor where they don't."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from manylora.adapters.errors import AdapterNotFound, InvalidAdapter, UnsupportedAdapter
from manylora.adapters.header import header_limit
from manylora.adapters.reader import LoadedAdapter, inspect_adapter, read_adapter
from tests.adapters.making import HIDDEN, MODULES, VOCABULARY, factors, write

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"
ALL = {path.rsplit(".", 1)[-1] for path in MODULES}


def read(directory: Path, dtype: torch.dtype = torch.float32) -> LoadedAdapter:
    return read_adapter(directory, MODULES, max_rank=16, dtype=dtype, vocab_size=VOCABULARY)


GOLDEN: list[dict[str, object]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "r": 8, "lora_alpha": 4},
    {"target_modules": r".*layers\.1\..*(gate|down)_proj"},
    {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2, r".*\.0\..*q_proj": 7}},
    {"target_modules": ["k_proj", "o_proj"], "alpha_pattern": {"layers.1.self_attn.o_proj": 32}},
    {
        "target_modules": ["q_proj"],
        "use_rslora": True,
        "r": 9,
        "rank_pattern": {"layers.0.self_attn.q_proj": 4},
    },
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "mlp.up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("fields", GOLDEN, ids=str)
def test_deltas_equal_those_of_peft(
    base: LlamaForCausalLM, tmp_path: Path, fields: dict[str, object]
) -> None:
    torch.manual_seed(1)
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8} | fields)
    )
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    pairs = read(tmp_path).weights.pairs
    theirs = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert pairs.keys() == theirs.keys()
    for path, module in theirs.items():
        ours = pairs[path].b.T @ pairs[path].a
        torch.testing.assert_close(ours, module.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-5)
        assert pairs[path].a.is_contiguous()
        assert pairs[path].b.is_contiguous()


def test_the_scale_is_applied_before_rounding(tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in factors().items()}
    write(tmp_path, tensors=tensors, changes={"lora_alpha": 3})
    pair = read(tmp_path, torch.float16).weights.pairs["model.layers.0.self_attn.q_proj"]
    expected = (tensors[f"{Q0}.lora_B.weight"].float() * (3 / 4)).T.to(torch.float16)
    assert torch.equal(pair.b, expected)
    assert pair.a.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_8_bits_are_what_they_are_in_more(tmp_path: Path, dtype: torch.dtype) -> None:
    rounded = {name: tensor.to(dtype) for name, tensor in factors().items()}
    narrow = write(tmp_path / "narrow", tensors=rounded)
    wide = write(tmp_path / "wide", tensors={name: tensor.float() for name, tensor in rounded.items()})
    for path, pair in read(narrow).weights.pairs.items():
        other = read(wide).weights.pairs[path]
        assert torch.equal(pair.a, other.a)
        assert torch.equal(pair.b, other.b)
    rounded[f"{Q0}.lora_A.weight"] = torch.full((4, HIDDEN), torch.nan).to(dtype)
    with pytest.raises(InvalidAdapter, match="NaN"):
        read(write(narrow, tensors=rounded))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("init", ["pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_converted_adds_to_the_plain_base_what_training_did(
    base: LlamaForCausalLM, tmp_path: Path, init: str, rslora: bool
) -> None:
    """Unconverted it is refused; converted it has twice the rank, and its own scale."""
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj"],
        # peft converts no rsLoRA that has patterns.
        rank_pattern={} if rslora else {"up_proj": 3},
        alpha_pattern={} if rslora else {"up_proj": 2},
        init_lora_weights=init,
        use_rslora=rslora,
    )
    model = get_peft_model(copy.deepcopy(base), config)
    assert isinstance(model, PeftModel)
    config.init_lora_weights = True  # as peft asks for, to save the start
    model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    config.init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    with pytest.raises(UnsupportedAdapter, match="convert it"):
        read(tmp_path / "own")
    to = tmp_path / "converted"
    model.save_pretrained(
        to, save_embedding_layers=False, path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    pairs = read(to).weights.pairs
    before = dict(base.named_parameters())
    after = dict(model.merge_and_unload().named_parameters())
    assert pairs
    for path, pair in pairs.items():
        change = (after[f"{path}.weight"] - before[f"{path}.weight"]).detach()
        assert len(pair.a) == (6 if path.endswith("up_proj") and not rslora else 8)
        torch.testing.assert_close(pair.b.T @ pair.a, change, rtol=1e-4, atol=1e-5)


def test_the_outline_says_what_reading_gives(tmp_path: Path) -> None:
    write(tmp_path)
    outline = inspect_adapter(tmp_path, MODULES, max_rank=16)
    assert outline.rank_by_module() == read(tmp_path).weights.rank_by_module() == {"q_proj": 4, "v_proj": 4}


def test_the_digest_follows_the_contents(tmp_path: Path) -> None:
    first, same, other = (write(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert read(first).digest == read(same).digest != read(other).digest
    (same / "chat_template.jinja").write_text("{{ x }}")
    assert read(first).digest != read(same).digest


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def with_one(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {**tensors, name: tensor}


BROKEN: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str, str]] = [
    (lambda t: without(t, f"{Q0}.lora_B.weight"), "missing", f"{Q0}.lora_B.weight"),
    (
        lambda t: without(without(t, f"{Q0}.lora_A.weight"), f"{Q0}.lora_B.weight"),
        "missing",
        f"{Q0}.lora_A.weight",
    ),
    (lambda t: with_one(t, f"{Q0}.lora_A.weight", torch.ones(4, 8)), "shape", f"{Q0}.lora_A.weight"),
    (lambda t: with_one(t, f"{Q0}.lora_B.weight", torch.ones(HIDDEN, 2)), "rank 4", f"{Q0}.lora_B.weight"),
    (lambda t: with_one(t, f"{Q0}.extra", torch.ones(1)), "not LoRA", f"{Q0}.extra"),
    (
        lambda t: with_one(t, "base_model.model.other.lora_A.weight", torch.ones(1)),
        "base lacks",
        "base_model.model.other.lora_A.weight",
    ),
    (
        lambda t: with_one(t, f"{Q0}.lora_A.weight", torch.full((4, HIDDEN), torch.nan)),
        "NaN",
        f"{Q0}.lora_A.weight",
    ),
    (
        lambda t: with_one(t, f"{Q0}.lora_B.weight", torch.full((HIDDEN, 4), torch.inf)),
        "Inf",
        f"{Q0}.lora_B.weight",
    ),
    (
        lambda t: with_one(t, "base_model.model.lm_head.lora_A.weight", torch.ones(1)),
        "head",
        "base_model.model.lm_head.lora_A.weight",
    ),
    (
        lambda t: with_one(t, f"{Q0}.lora_A.weight", torch.ones(4, HIDDEN, dtype=torch.int8)),
        "dtype I8",
        f"{Q0}.lora_A.weight",
    ),
    (lambda t: {}, "missing", f"{Q0}.lora_A.weight"),
]


@pytest.mark.parametrize(("breaking", "why", "tensor"), BROKEN)
def test_an_adapter_is_read_whole_or_not_at_all(
    tmp_path: Path, breaking: Callable[[dict[str, Tensor]], dict[str, Tensor]], why: str, tensor: str
) -> None:
    write(tmp_path, tensors=breaking(factors()))
    with pytest.raises(InvalidAdapter, match=why) as caught:
        read(tmp_path)
    assert caught.value.file == WEIGHTS
    assert caught.value.tensor == tensor
    assert tensor in str(caught.value)


def test_many_offenders_are_a_handful_in_the_message(tmp_path: Path) -> None:
    write(tmp_path, tensors=factors() | {f"stray.{i}": torch.ones(1) for i in range(100)})
    with pytest.raises(InvalidAdapter, match=r"100 tensors .* and 95 more"):
        read(tmp_path)


def test_overflow_of_the_serving_dtype_is_an_error(tmp_path: Path) -> None:
    write(
        tmp_path,
        tensors={name: tensor * 1e4 for name, tensor in factors().items()},
        changes={"lora_alpha": 1000},
    )
    read(tmp_path)
    with pytest.raises(InvalidAdapter, match=r"overflows torch\.float16"):
        read(tmp_path, torch.float16)


@pytest.mark.parametrize(
    ("fields", "kind", "why"),
    [
        ({"target_modules": ["c_attn"]}, InvalidAdapter, "no module of this base .*q_proj"),
        ({"target_modules": ["q_proj", "lm_head"]}, UnsupportedAdapter, "lm_head"),
        ({"target_modules": ["model.embed_tokens"]}, UnsupportedAdapter, "embed_tokens"),
        ({"r": 17}, UnsupportedAdapter, "up to 16"),
        ({"rank_pattern": {"v_proj": 32}}, UnsupportedAdapter, "rank 32"),
        ({"target_modules": ["q_proj"]}, InvalidAdapter, "base lacks"),
    ],
)
def test_configs_that_do_not_fit(
    tmp_path: Path, fields: dict[str, object], kind: type[Exception], why: str
) -> None:
    write(tmp_path, changes=fields)
    with pytest.raises(kind, match=why):
        read(tmp_path)


def test_pickle_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapter, match="pickle"):
        read(tmp_path)


def test_missing_and_garbled_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound):
        read(tmp_path / "nowhere")
    with pytest.raises(AdapterNotFound, match="adapter_config"):
        read(tmp_path)
    write(tmp_path)
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(InvalidAdapter) as caught:
            read(tmp_path)
        assert caught.value.file == "adapter_config.json"


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": 4}, ["q_proj", "v_proj", "x\ud83d"]])
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "base_model_name_or_path"])
def test_half_a_surrogate_pair_in_a_config_is_refused(tmp_path: Path, field: str, value: object) -> None:
    write(tmp_path, changes={field: value})
    with pytest.raises(InvalidAdapter, match="surrogate"):
        read(tmp_path)
    whole = json.dumps({"base_model_name_or_path": "\U0001f984"})
    assert "\\ud83e" in whole
    read(write(tmp_path, changes=json.loads(whole)))


def test_names_of_a_hundred_thousand_parts_are_looked_through_in_one_pass(tmp_path: Path) -> None:
    """A pattern over the whole name would begin again at every dot: work that is the square of its length."""
    name = "lm_head." * 100_000 + "\n"
    write(tmp_path, changes={"target_modules": ["q_proj", "v_proj", name]})
    assert len(read(tmp_path).weights.pairs) == 4


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_pass_unseen(tmp_path: Path, data: st.DataObject) -> None:
    """Truncated or lengthened anywhere, or with a broken header, the file is refused with a clear error."""
    whole = (write(tmp_path) / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cut = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, 7))] ^= data.draw(st.integers(1, 255))
    brace = whole[: header - 1].rindex(b"}")
    unclosed = whole[:brace] + b" " + whole[brace + 1 :]
    damaged = data.draw(st.sampled_from([whole[:cut], whole + b"x", bytes(flipped), unclosed]))
    (tmp_path / WEIGHTS).write_bytes(damaged)
    with pytest.raises(InvalidAdapter):
        read(tmp_path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    write(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InvalidAdapter, match="next free"):
        read(tmp_path)


def test_numbers_may_be_as_large_as_transformers_writes_them_and_not_larger(tmp_path: Path) -> None:
    """Tokenizers without a limit have one of 10**30."""
    tokenizer = {"model_max_length": int(1e30), "chat_template": "x"}
    write(tmp_path, files={"tokenizer_config.json": json.dumps(tokenizer)})
    assert read(tmp_path).chat_template == "x"
    write(tmp_path, files={"tokenizer_config.json": json.dumps({"model_max_length": 10**308})})
    with pytest.raises(InvalidAdapter, match=r"tokenizer_config.json: is not JSON: a number of 309 digits"):
        read(tmp_path)


def test_a_tensor_of_many_dimensions_is_refused_before_its_sizes_are_multiplied(tmp_path: Path) -> None:
    """The product of a megabyte of sizes takes minutes, interpreter lock in hand."""
    write(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] += [1] * 20
    raw = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + whole[8 + length :])
    with pytest.raises(InvalidAdapter, match="malformed"):
        inspect_adapter(tmp_path, MODULES, max_rank=64)


def test_a_header_larger_than_the_base_can_need_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = header_limit(factors(targets=tuple(ALL)))
    config = (write(tmp_path) / "adapter_config.json").read_bytes()
    padded = write_padded(tmp_path, limit)
    read(tmp_path)
    parsed: list[int] = []
    loads = json.loads

    def counted(text: str, **more: Any) -> object:
        parsed.append(len(text))
        return loads(text, **more)

    monkeypatch.setattr(json, "loads", counted)
    for length in (limit + 1, 64 << 20):
        with padded.open("r+b") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(8 + length)
        with pytest.raises(InvalidAdapter, match=f"a header of {length} bytes; at most {limit}"):
            read(tmp_path)
    assert set(parsed) == {len(config)}, "only the config was parsed"


def write_padded(directory: Path, length: int) -> Path:
    """Fill the header of the weights in ``directory`` with spaces up to ``length`` bytes."""
    path = directory / WEIGHTS
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(length.to_bytes(8, "little") + whole[8:end].ljust(length) + whole[end:])
    return path


def test_the_largest_header_that_peft_writes_for_a_base_passes(tmp_path: Path) -> None:
    tensors = {
        name.replace(".weight", ".default.weight"): t for name, t in factors(targets=tuple(ALL)).items()
    }
    path = write(tmp_path, tensors=tensors, changes={"target_modules": "all-linear"}) / WEIGHTS
    entries = int.from_bytes(path.read_bytes()[:8], "little")
    assert entries < (header_limit(factors(targets=tuple(ALL))) - (256 << 10)) / 1.5
    read(tmp_path)


def test_keys_of_a_model_s_state_dict_are_those_of_the_file(tmp_path: Path) -> None:
    saved = read(write(tmp_path / "saved")).weights.pairs
    tensors = {
        name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor
        for name, tensor in factors().items()
    }
    loaded = read(write(tmp_path / "state", tensors=tensors)).weights.pairs
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[path].b, loaded[path].b) for path in saved)
    twice = {**factors(), f"{Q0}.lora_A.default.weight": factors()[f"{Q0}.lora_A.weight"]}
    with pytest.raises(InvalidAdapter, match="twice"):
        read(write(tmp_path / "twice", tensors=twice))


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (write(tmp_path) / name).write_text(pointer)
    with pytest.raises(InvalidAdapter, match=r"Git LFS pointer.*git lfs pull") as caught:
        read(tmp_path)
    assert caught.value.file == name


@pytest.mark.parametrize(
    ("changes", "tensors"),
    [
        ({"target_modules": ["c_attn"]}, {}),
        ({}, {f"{Q0}.lora_A.weight": torch.ones(4, 8)}),
        ({}, {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 8)}),
    ],
)
def test_an_adapter_for_another_base_says_for_which(
    tmp_path: Path, changes: dict[str, object], tensors: dict[str, Tensor]
) -> None:
    changes = {**changes, "base_model_name_or_path": "someone/other-7b"}
    write(tmp_path, tensors={**factors(), **tensors}, changes=changes)
    with pytest.raises(InvalidAdapter, match="made for 'someone/other-7b'"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("adapter_config.json", 1 << 20),
        ("added_tokens.json", 1 << 20),
        ("chat_template.jinja", 1 << 20),
        ("tokenizer_config.json", 4 << 20),
    ],
)
def test_texts_of_megabytes_are_not_parsed(tmp_path: Path, name: str, limit: int) -> None:
    path = write(tmp_path, files={} if name == "adapter_config.json" else {name: "{}"}) / name
    path.write_text(path.read_text().ljust(limit))
    read(tmp_path)
    path.write_text(path.read_text() + " ")
    with pytest.raises(InvalidAdapter, match=f"{limit + 1} bytes; at most {limit}"):
        read(tmp_path)


def test_added_tokens_must_be_the_base_s_own(tmp_path: Path) -> None:
    write(tmp_path, files={"added_tokens.json": json.dumps({"<|im_end|>": VOCABULARY - 1})})
    read(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": VOCABULARY}))
    with pytest.raises(UnsupportedAdapter, match="<new>"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config.json": "{}"}, None),
        ({"tokenizer_config.json": '{"chat_template": "T"}'}, "T"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "D"}]}'}, "D"),
        ({"tokenizer_config.json": '{"chat_template": "T"}', "chat_template.jinja": "J"}, "J"),
    ],
)
def test_the_adapter_s_own_chat_template(tmp_path: Path, files: dict[str, str], template: str | None) -> None:
    assert read(write(tmp_path, files=files)).chat_template == template

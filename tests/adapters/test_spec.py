"""Configs: what is understood as peft understands it, and what is refused by name."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.spec import AdapterSpec
from tests.adapters.making import MODULES, config

PATHS = [*sorted(MODULES), "model.layers.10.self_attn.q_proj", "blocks.1.layers.0.mlp.up_proj"]
NAMES = [
    "q_proj",
    "proj",
    "self_attn.v_proj",
    "model.layers.1.mlp.up_proj",
    "layers.0.mlp.down_proj",
    "up_proj",
]
REGEXES = [r".*q_proj", r".*\.layers\.(0|10)\..*_proj", r".*mlp.*", "q_proj", r"(?:.*?attn.*?(?:q|k)_proj)"]
KEYS = [
    "q_proj",
    "layers.0.self_attn.q_proj",
    r"layers\.1\..*",
    "^model.layers.0.mlp.up_proj",
    ".*v_proj",
    "proj",
]


def test_what_peft_writes_by_default_is_accepted() -> None:
    written = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    decoded = json.loads(json.dumps(written, default=sorted))
    assert AdapterSpec.parse(decoded).target_modules == ("q_proj",)


@given(
    targets=st.one_of(st.lists(st.sampled_from(NAMES), min_size=1, unique=True), st.sampled_from(REGEXES)),
    exclude=st.one_of(st.none(), st.lists(st.sampled_from(NAMES)), st.sampled_from(REGEXES)),
    layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 10), max_size=2)),
    pattern=st.sampled_from([None, "layers", ["blocks", "layers"], "h", []]),
)
def test_targets_are_those_of_peft(targets: object, exclude: object, layers: object, pattern: object) -> None:
    if isinstance(targets, str):
        layers = pattern = None
    fields = {
        "target_modules": targets,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    spec = AdapterSpec.parse(config(**fields))
    theirs = SimpleNamespace(**fields, modules_to_save=None, target_parameters=None)
    for path in PATHS:
        found = check_target_module_exists(theirs, path)
        assert spec.targets(path) == (bool(found) and type(found).__name__ != "_ExcludedModule"), path


@given(ranks=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 64)), rslora=st.booleans(), data=st.data())
def test_rank_and_scale_are_those_of_peft(ranks: dict[str, int], rslora: bool, data: st.DataObject) -> None:
    alphas = data.draw(st.dictionaries(st.sampled_from(KEYS), st.integers(1, 64)))
    spec = AdapterSpec.parse(config(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora))
    for path in PATHS:
        rank = ranks.get(get_pattern_key(list(ranks), path), 4)
        alpha = alphas.get(get_pattern_key(list(alphas), path), 8)
        assert spec.rank_of(path) == rank
        assert spec.scale_of(path) == pytest.approx(alpha / (rank**0.5 if rslora else rank))


def test_all_linear_takes_every_module_but_the_excluded() -> None:
    spec = AdapterSpec.parse(config(target_modules="all-linear", exclude_modules=["up_proj"]))
    assert {path for path in MODULES if spec.targets(path)} == {
        p for p in MODULES if not p.endswith("up_proj")
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"bias": "some"}, "none, all, lora_only"),
        ({"trainable_token_indices": {"norm": [1]}}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"kasa_config": {"a": 1}}, "kasa_config"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "convert"),
        ({"init_lora_weights": "corda"}, "convert"),
        ({"init_lora_weights": "loftq"}, "convert"),
        ({"init_lora_weights": "new_kind"}, "new_kind"),
        ({"invented_field": {"x": 1}}, "invented_field"),
    ],
)
def test_other_kinds_are_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=named) as caught:
        AdapterSpec.parse(config(**change))
    assert caught.value.file == "adapter_config.json"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 10**401}, "lora_alpha"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": "("}, "regular expression"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj"),
        ({"rank_pattern": [4]}, "rank_pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
    ],
)
def test_malformed_fields_are_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidAdapter, match=named):
        AdapterSpec.parse(config(**change))


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_fields_pass_at_nothing(value: object) -> None:
    AdapterSpec.parse(config(invented_field=value))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_pass(init: object) -> None:
    AdapterSpec.parse(config(init_lora_weights=init))

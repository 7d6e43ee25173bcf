"""Which fields of an adapter_config.json are understood, which change nothing, and which kinds are refused by name.

A kind that comes to be served moves from NOT_SERVED to READ, and what it says becomes a field of AdapterSpec.
"""

from collections.abc import Mapping

from manylora.adapters.config_fields import CONFIG_FILE, shown
from manylora.adapters.errors import UnsupportedAdapter
from manylora.adapters.invocation import FIELDS as INVOCATION

READ = frozenset(
    [
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "init_lora_weights",
        "bias",
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
        *INVOCATION,
    ]
)
TRAINING_ONLY = frozenset(
    [
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "eva_config",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
    ]
)
"""Fields that change nothing once the tensors exist, whatever their value."""

NOT_SERVED = {
    "target_parameters": "factors of bare parameters",
    "megatron_config": "Megatron layers",
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
BIASES = ("none", "all", "lora_only")
"""Which of the base's biases were trained: of all linear layers, or of those that have factors."""
_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION")
"""The second is what sentence-transformers trains, on a model without its head."""
_PLAIN_INITS = frozenset(("true", "false", "gaussian", "eva", "orthogonal", "mica"))
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_other_kinds(config: Mapping[str, object]) -> None:
    """Raise UnsupportedAdapter for a config that says something which would change the answers and isn't served."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapter(f"peft_type is {shown(kind)}; only LORA is served", file=CONFIG_FILE)
    for key, what in NOT_SERVED.items():
        if config.get(key):
            raise UnsupportedAdapter(f"{key} is set: {what} is a kind not served yet", file=CONFIG_FILE)
    bias = config.get("bias")
    if bias not in (None, *BIASES):
        raise UnsupportedAdapter(f"bias is {shown(bias)}; {', '.join(BIASES)} are served", file=CONFIG_FILE)
    task = config.get("task_type")
    if task not in (None, *_TASKS):
        raise UnsupportedAdapter(
            f"task_type is {shown(task)}; {' and '.join(_TASKS)} are served", file=CONFIG_FILE
        )
    _refuse_changed_base(config.get("init_lora_weights", True))
    known = READ | TRAINING_ONLY | NOT_SERVED.keys()
    for key in sorted(config.keys() - known):
        if config[key]:
            raise UnsupportedAdapter(
                f"field {shown(key)} is not known and may change what the adapter computes",
                file=CONFIG_FILE,
            )


def _refuse_changed_base(init: object) -> None:
    """PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ move part of the base into the factors: it is another base."""
    name = str(init).lower() if isinstance(init, str | bool) else shown(init)
    if name.startswith(_BASE_CHANGING_INITS):
        raise UnsupportedAdapter(
            f"init_lora_weights is {shown(init)}: this adapter belongs to a changed base and would be wrong on the"
            " plain one; convert it with save_pretrained(path_initial_model_for_weight_conversion=…)",
            file=CONFIG_FILE,
        )
    if init is not None and name not in _PLAIN_INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights {shown(init)} is a kind not served yet", file=CONFIG_FILE
        )

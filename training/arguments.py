"""The flags of `manylora train`: those of Qwen's finetune.py with its defaults, transformers' own, and ours.

A YAML file may hold the same keys. What was renamed since in transformers is taken by its old name (old_flags.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import TrainingArguments as HfTrainingArguments

from manylora.quant.nf4 import DOUBLE_QUANT
from manylora.training.data.formats import FORMATS

FORMAT_NAMES = [one.name for one in FORMATS]


@dataclass
class ModelArguments:
    """The base model."""

    _argument_group_name = "Base"
    model_name_or_path: str = field(
        default="Qwen/Qwen2.5-7B-Instruct",
        metadata={"help": "The base: a directory, or OWNER/MODEL of the hub."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the checkpoint."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})


@dataclass
class DataArguments:
    """The data."""

    _argument_group_name = "Data"
    data_path: list[str] = field(
        default_factory=list,
        metadata={"help": "Data files: JSON, JSONL, CSV or Parquet; FILE:SHARE takes a share of one."},
    )
    eval_data_path: list[str] = field(
        default_factory=list, metadata={"help": "Data files for evaluation, never trained on."}
    )
    eval_share: float = field(
        default=0.0, metadata={"help": "Without --eval_data_path: share of the data held out for evaluation."}
    )
    data_format: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(FORMAT_NAMES)}; without it, told by the rows.",
            "choices": FORMAT_NAMES,
        },
    )
    columns: str | None = field(
        default=None,
        metadata={"help": "Fields that the files name otherwise: prompt=ticket,completion=label."},
    )
    lazy_preprocess: bool = field(
        default=False,
        metadata={
            "help": "Taken for old commands' sake: rows are checked and tokenised before the run all the same,"
            " into files, so that they take no memory."
        },
    )
    packing: bool = field(
        default=False, metadata={"help": "Put several examples into one row; they don't see each other."}
    )
    data_check: str = field(
        default="warn",
        metadata={
            "help": "Check the data before the run: warn, strict (findings end it) or off.",
            "choices": ["warn", "strict", "off"],
        },
    )


@dataclass
class LoraArguments:
    """The adapter."""

    _argument_group_name = "Adapter"
    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: float = field(default=16, metadata={"help": "The change is scaled by alpha/r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names of the modules to adapt, without which it is every linear layer of the blocks; the first"
            " Qwen's names (c_attn c_proj w1 w2) mean the same modules in other families."
        },
    )
    lora_weight_path: str = field(
        default="", metadata={"help": "Start from this adapter's weights: the same as --from_adapter."}
    )
    lora_bias: str = field(default="none", metadata={"help": "none, all or lora_only."})
    q_lora: bool = field(
        default=False, metadata={"help": "The base in 4 bits: NF4, or GPTQ/AWQ as it comes."}
    )
    double_quant: bool = field(
        default=DOUBLE_QUANT,
        metadata={"help": "Quantise NF4's scales too; then serve the base with --double-quant."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha/√r (arXiv 2312.03732)."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA (arXiv 2402.09353)."})
    init_lora_weights: str = field(
        default="default", metadata={"help": "default, gaussian, orthogonal, pissa, pissa_niter_N or loftq."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: B learns this many times faster than A (arXiv 2402.12354)."}
    )
    modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "Modules to train whole and save beside the factors."}
    )
    alora_invocation_string: str | None = field(
        default=None,
        metadata={
            "help": "aLoRA (arXiv 2504.12397): the adapter acts from the last place of this text in a prompt on, and"
            " what comes before is the base's."
        },
    )
    alora_invocation_tokens: list[int] = field(
        default_factory=list, metadata={"help": "The same by token ids, as PEFT's config has them."}
    )
    rank_schedule: str | None = field(
        default=None,
        metadata={"help": "RANK:SHARE,… grows the rank, as in 8:0,16:0.3,64:0.6; adalora:… prunes it."},
    )


@dataclass
class RunArguments:
    """What a run does beside training."""

    _argument_group_name = "Run"
    config: str | None = field(default=None, metadata={"help": "YAML file with the same keys; flags win."})
    tasks: str | None = field(default=None, metadata={"help": "YAML file: one adapter for each task."})
    resume: bool = field(
        default=False, metadata={"help": "Go on with the run in --output_dir from its last checkpoint."}
    )
    from_adapter: str | None = field(
        default=None, metadata={"help": "Start a new run from this adapter's weights."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the adapter and the checkpoints in --output_dir."}
    )
    auto_fit: bool = field(
        default=False, metadata={"help": "Change batch, checkpointing and bits until the run fits."}
    )
    auto_fit_cut: int = field(
        default=0,
        metadata={
            "help": "Let --auto_fit cut examples, last of all and to no fewer tokens than this; 0: it never does."
        },
    )
    memory: str | None = field(
        default=None, metadata={"help": "Memory that the run may use, as in 24GiB; all of the device."}
    )
    guard: str = field(
        default="on",
        metadata={
            "help": "Watch loss and gradients: on (a run that goes astray goes back or stops), warn (say it), off.",
            "choices": ["off", "warn", "on"],
        },
    )
    on_divergence: str = field(
        default="backoff",
        metadata={
            "help": "When the loss runs away: backoff (last good step, half the rate), stop, or ignore.",
            "choices": ["backoff", "stop", "ignore"],
        },
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after this many evaluations without a better one; 0: never."}
    )
    eval_answers: str = field(
        default="none",
        metadata={
            "help": "Judge answers through the served 4-bit base too: exact, regex, json or json_equal.",
            "choices": ["none", "exact", "regex", "json", "json_equal"],
        },
    )
    eval_answers_pattern: str | None = field(
        default=None, metadata={"help": "With regex: the pattern; without, the reference is the pattern."}
    )
    eval_answers_limit: int = field(default=64, metadata={"help": "Examples that are answered."})
    eval_answers_max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens."})
    register: str | None = field(
        default=None, metadata={"help": "URL of a manylora server that takes the finished adapter."}
    )
    adapter_name: str | None = field(
        default=None, metadata={"help": "Its name there; the output directory's."}
    )
    description: str | None = field(
        default=None, metadata={"help": "What the adapter is for, written into its manylora_adapter.json."}
    )
    route_examples: int = field(
        default=0,
        metadata={
            "help": "Write this many prompts of the data into the adapter's manylora_adapter.json, word for word, for"
            " the server's model auto to know its prompts by; 0: none."
        },
    )
    admin_key: str | None = field(default=None, metadata={"help": "That server's --admin-key."})
    live: bool = field(default=True, metadata={"help": "Live display on a terminal; plain lines elsewhere."})


@dataclass
class TrainingArguments(HfTrainingArguments):
    """transformers' arguments with Qwen's additions and defaults."""

    _argument_group_name = "Training, by transformers' names"
    optim: str = field(default="adamw_torch", metadata={"help": "Optimiser, by transformers' name."})
    model_max_length: int = field(
        default=8192, metadata={"help": "Longest example, in tokens; longer ones are cut and counted."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Train an adapter. What this command is for."})

    @property
    def n_gpu(self) -> int:
        """How many GPUs this process trains on: one at most.

        Of several that it sees transformers would make DataParallel, whose replicas share no window of tokens.
        """
        return min(1, int(super().n_gpu))


@dataclass(frozen=True, slots=True)
class Arguments:
    """All arguments of a run, and what there is to say about them."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    run: RunArguments
    training: TrainingArguments
    learning_rate_auto: bool
    """--learning_rate auto: found on the data before the run."""
    given: frozenset[str]
    """Names that were given by flag or file, as against defaults."""
    notes: tuple[str, ...]
    """Sentences for the user: what was changed or left out, and why."""
    command: tuple[str, ...] = ()
    """The flags as they were given."""

    @property
    def adapter_start(self) -> str | None:
        """The adapter to start from, by either name of the flag."""
        return self.run.from_adapter or self.lora.lora_weight_path or None


ARGUMENT_CLASSES: Sequence[type] = (
    ModelArguments,
    DataArguments,
    LoraArguments,
    RunArguments,
    TrainingArguments,
)

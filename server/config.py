"""Every setting of the server: flag = environment variable = config-file key.

``--max-running 32``, ``MANYLORA_MAX_RUNNING=32`` and ``max_running: 32`` in the file that ``--config`` names
say the same; the flag wins, then the environment, then the file: server/config_sources.py reads them. Values
are checked once, here; what is measured at start (KV blocks, arena rows) is another object and is never
written back.
"""

import ipaddress
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from manylora.server.named_arguments import AdapterArgument, MixtureArgument

Repeatable = tuple[str, ...]
"""A flag that may be repeated; in the environment its values are separated by commas."""

ENV_PREFIX = "MANYLORA_"
LEAST_SHARE, MOST_SHARE = 1e-3, 1e3
"""Weights of adapters among each other: further apart one of them would as good as never begin."""
MOST_MIXTURE_PARTS = 64
"""Parts of a mixture that any server takes: a request names them all, and so does a header of its answer."""


class ServeSettings(BaseModel):
    """Settings of ``manylora serve``. Frozen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    _names: dict[str, str] = PrivateAttr(default_factory=dict)

    base: str | None = Field(
        None, description="Directory or hub name of the base model; none: the bundled demo."
    )
    adapter: Repeatable = Field((), description="Register an adapter at start, as name=path. Repeatable.")
    mixture: Repeatable = Field(
        (),
        description="Serve a mixture of adapters under a name, as name=sql:0.7+pirate:0.3. Repeatable.",
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(
        Path(".manylora"),
        description="Where the registry, the adapters' files and prepared weights are kept.",
    )
    weight_cache: bool = Field(
        True, description="Keep prepared weights below --data-dir, so that the next start maps them."
    )
    weight_cache_gib: float = Field(
        20.0, gt=0, description="Disk that kept weights may take in GiB; the longest unused go first."
    )
    start_anew: bool = Field(
        False,
        description="Start although the registry of --data-dir is gone: the files that it knew are deleted.",
    )
    adapter_root: Path = Field(Path("."), description="Adapters are only read from below this directory.")
    allow_source: Repeatable = Field(
        (),
        description="Where adapters may be downloaded from, as hf://org or https://host/path/; none: nowhere. "
        "Repeatable.",
    )
    private_sources: bool = Field(
        False, description="Let downloads be from private, loopback and link-local addresses."
    )
    max_source_gib: float = Field(
        8.0, gt=0, description="Largest adapter that is downloaded or uploaded, in GiB; more is refused."
    )
    source_timeout: float = Field(
        1800.0, gt=0, description="Seconds that the download or the upload of an adapter may take."
    )
    download_workers: int = Field(
        4, ge=1, le=64, description="Adapters that are downloaded at the same time."
    )
    watch: Path | None = Field(
        None,
        description="Serve each adapter in a folder of this directory under the folder's name, and follow it.",
    )
    watch_seconds: float = Field(2.0, gt=0, description="Seconds between two looks at --watch.")
    watch_removed: Literal["delete", "keep"] = Field(
        "delete", description="What becomes of an adapter whose folder leaves --watch."
    )
    resolve: str | None = Field(
        None,
        min_length=1,
        description="Where a model that isn't registered is looked for when it is asked for: a directory, or a URL as "
        "hf://org/{name}.",
    )
    resolve_timeout: float = Field(
        60.0, gt=0, description="Seconds that a request waits for a model that is being looked for; then 503."
    )
    served_model_name: str | None = Field(
        None, min_length=1, description="Name of the base in the API; none: its directory or hub name."
    )

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of activations and unquantised weights; auto: bfloat16 where it is fast and keeps them.",
    )
    quantization: Literal["auto", "nf4", "int8", "none"] = Field(
        "auto",
        description="auto: 4-bit checkpoints and merged models as they are, 16-bit ones as NF4; int8: those in 8 bits.",
    )
    double_quant: bool = Field(False, description="Quantise NF4's scales too when quantising at load.")
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads that compute; 0: one for each core that may be used."
    )
    kernels: Literal["auto", "plain", "amx", "avx512_bf16", "avx512_vnni", "avx2", "neon"] = Field(
        "auto",
        description="Kernels of a CPU; auto: native ones, the fastest that it runs; plain: torch; or a level by name.",
    )
    activations: Literal["int8", "bfloat16"] = Field(
        "int8",
        description="What native CPU kernels multiply 4- and 8-bit weights by; bfloat16: finer, prompts slower.",
    )
    cuda_graphs: bool = Field(
        True,
        description="Record a GPU's decode steps and play them back, if what is tried at load is right; off: op by op.",
    )
    exact: bool = Field(
        False, description="Compute in plain torch, as transformers does, and not with activations of 8 bits."
    )

    max_model_len: int = Field(0, ge=0, description="Context limit in tokens; 0: the model's own.")
    max_running: int = Field(256, ge=1, description="Sequences that decode at the same time.")
    max_waiting: int = Field(1024, ge=1, description="Clients' requests that may wait; more get 429.")
    max_step_tokens: int = Field(
        512, ge=16, description="Tokens of one step, prompts' chunks and decodes together."
    )
    max_step_context: int = Field(
        0,
        ge=0,
        description="Context tokens that a step's further sequences of each request fill; 0: by the device.",
    )
    block_size: int = Field(16, ge=1, description="Tokens of one KV block.")
    kv_cache_gib: float = Field(
        0.0, ge=0, description="Memory for KV blocks in GiB; 0: a share of what is free."
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "int8"] = Field(
        "auto",
        description="Type of keys and values; auto: bfloat16 by native kernels, else --dtype; int8: half of that.",
    )
    arena_rows: int = Field(
        0, ge=0, description="Rank rows for each module on the device; 0: as arena_gib, or from free memory."
    )
    arena_gib: float = Field(
        0.0,
        ge=0,
        description="Memory for adapters on the device in GiB, instead of arena_rows; 0: as those say.",
    )
    max_rank: int = Field(256, ge=1, description="Largest rank of an adapter that is accepted.")
    host_cache_gib: float = Field(2.0, gt=0, description="Memory for adapters that wait on the host, in GiB.")
    adapter_weight: Repeatable = Field(
        (),
        description="Tokens that an adapter, a mixture or the base gets for each of one of weight 1 while requests "
        "for both wait, as name=weight. Repeatable; else 1.",
    )
    vocabulary_gib: float = Field(
        1.0,
        ge=0,
        description="Memory on the device for embeddings and heads that adapters bring, in GiB; taken as they come.",
    )
    adapter_timeout: float = Field(
        30.0, gt=0, description="Seconds a request waits for room for its adapter; then 503."
    )

    template_timeout: float = Field(
        5.0,
        gt=0,
        le=300,
        description="Seconds that an adapter's chat template may take for one chat; then 400.",
    )

    tool_parser: Literal["auto", "hermes", "qwen3_coder", "llama3_json", "mistral"] = Field(
        "auto", description="How models write calls of tools; auto: as their chat templates tell."
    )

    api_key: Repeatable = Field((), description="Key that /v1 asks for. Repeatable.")
    admin_key: str | None = Field(
        None, description="Key that /adapters asks for; none: loopback callers only."
    )
    share_prefixes: bool = Field(
        False,
        description="Let tenants share cached prefixes: faster, but timing tells what others asked.",
    )
    audit_log: Path | None = Field(
        None, description="Where acts of administration are written down; none: audit.jsonl in --data-dir."
    )
    cors_origin: Repeatable = Field((), description="Origin that browsers may call from. Repeatable.")
    allowed_host: Repeatable = Field(
        (), description="Host name under which adapters are managed without an admin key. Repeatable."
    )
    max_body_mib: float = Field(12.0, gt=0, description="Largest request body in MiB; more gets 413.")
    max_head_kib: float = Field(
        64.0, gt=0, description="Largest head of a request in KiB; more gets 431 or 414."
    )
    max_connections: int = Field(
        0, ge=0, description="Connections at the same time; 0: most of the open files that are allowed."
    )
    head_timeout: float = Field(30.0, gt=0, description="Seconds that a request's head may take; then 408.")
    body_timeout: float = Field(120.0, gt=0, description="Seconds that a request's body may take; then 408.")
    send_timeout: float = Field(
        300.0, gt=0, description="Seconds after which a client that reads nothing is cut off."
    )
    # Longer than clients keep one (httpx and openai 5 s, aiohttp 15 s): with equal times a request sometimes meets a
    # connection that is just being closed.
    idle_timeout: float = Field(75.0, gt=0, description="Seconds that an idle connection is kept.")
    max_mixture_parts: int = Field(
        8, ge=1, le=MOST_MIXTURE_PARTS, description="Adapters that a mixture may have."
    )
    keep_versions: int = Field(
        2,
        ge=0,
        le=100,
        description="Old versions that an adapter keeps, to be asked for as name@2 and gone back to.",
    )
    max_choices: int = Field(128, ge=1, description="Largest n of a request.")
    max_sequences: int = Field(
        1024, ge=1, description="Answers that one request may ask for: its prompts times n."
    )
    max_prompt_logprobs: int = Field(
        500_000,
        ge=1,
        description="Log probabilities of prompt tokens that one answer may hold: tokens times n times (logprobs + 1).",
    )
    pooling: Literal["auto", "last", "mean"] = Field(
        "auto",
        description="What an embedding is of a text's states: the last token's, or the mean. auto: as the base says, "
        "else last. An adapter that says its own goes by that.",
    )
    matryoshka: bool = Field(
        False,
        description="The models were trained so that an embedding may be cut: requests may give dimensions.",
    )
    auto_threshold: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="How near a prompt must be to an adapter's examples for the model auto to choose that adapter and "
        "not the base: 1 is the same way, 0 is none.",
    )
    auto_wait: float = Field(
        5.0,
        ge=0,
        description="Seconds that a request for the model auto waits for examples that are being read.",
    )
    auto_mib: float = Field(
        256.0, gt=0, description="Memory for the vectors of all adapters' examples in MiB."
    )
    max_file_mib: float = Field(200.0, gt=0, description="Largest file of /v1/files in MiB; more gets 413.")
    files_gib: float = Field(
        10.0, gt=0, description="Disk that uploaded files may take in GiB; more gets 507."
    )
    batch_in_flight: int = Field(
        16, ge=1, description="Lines of batches that are with the engine at the same time."
    )
    max_tokenize_characters: int = Field(
        1 << 18, ge=1, description="Longest text of /tokenize, in characters, as the template writes it."
    )
    keep_alive_seconds: float = Field(
        15.0, gt=0, description="A comment is sent on a stream that is silent so long."
    )
    drain_timeout: float = Field(
        60.0, ge=0, description="Seconds that running requests get after the first Ctrl-C."
    )
    audit_after: float = Field(
        0.0, ge=0, description="Idle seconds after which the pools' books are checked; 0: never."
    )
    max_adapter_labels: int = Field(100, ge=1, description="Adapters with labels of their own in /metrics.")
    log_format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )

    @field_validator(
        "adapter",
        "mixture",
        "adapter_weight",
        "allow_source",
        "api_key",
        "cors_origin",
        "allowed_host",
        mode="before",
    )
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("adapter")
    @classmethod
    def _adapters_are_name_and_path(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _check_named(value, "adapter", "name=path, for example sql=./adapters/sql")
        return value

    @field_validator("mixture")
    @classmethod
    def _mixtures_are_name_and_parts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _check_named(value, "mixture", "name=parts, for example sailor-sql=sql:0.7+pirate:0.3")
        return value

    @field_validator("adapter_weight")
    @classmethod
    def _weights_are_name_and_number(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        form = f"name=weight, for example sql=2, a number of {LEAST_SHARE:g} to {MOST_SHARE:g}"
        _check_named(value, "adapter_weight", form)
        for item in value:
            if not LEAST_SHARE <= _number(item.split("=", 1)[1]) <= MOST_SHARE:
                raise ValueError(f"{item!r} is not {form}")
        return value

    @field_validator("api_key", "admin_key")
    @classmethod
    def _keys_are_not_empty(cls, value: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if value == "" or (isinstance(value, tuple) and "" in value):
            raise ValueError("a key is empty: leave it out to serve without one")
        return value

    @property
    def adapters(self) -> tuple[AdapterArgument, ...]:
        """The adapters to register at start."""
        return tuple(AdapterArgument(item) for item in self.adapter)

    @property
    def mixtures(self) -> tuple[MixtureArgument, ...]:
        """The mixtures to serve at start."""
        return tuple(MixtureArgument(item) for item in self.mixture)

    @property
    def shares(self) -> dict[str, float]:
        """The weights of adapters, mixtures and the base among each other, by name."""
        return {
            name: float(weight) for name, _, weight in (each.partition("=") for each in self.adapter_weight)
        }

    @property
    def listens_beyond_loopback(self) -> bool:
        """Whether other machines can reach the server."""
        if self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return True  # a name may be any interface's

    def named_by(self, names: Mapping[str, str]) -> "ServeSettings":
        """Remember where each value was given (field → "--port", "MANYLORA_PORT", "port in settings.toml")."""
        self._names = dict(names)
        return self

    def name_of(self, field: str) -> str:
        """Return where a value was given, for messages; the flag where it is the default."""
        return self._names.get(field, "--" + field.replace("_", "-"))


def _number(text: str) -> float:
    """Return a number, NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _check_named(items: tuple[str, ...], what: str, form: str) -> None:
    """Raise ValueError unless each item is of that ``form``, a name, ``=`` and more, and no name comes twice."""
    names = set()
    for item in items:
        name, _, rest = item.partition("=")
        if not name or not rest:
            raise ValueError(f"{item!r} is not {form}")
        names.add(name)
    if len(names) != len(items):
        raise ValueError(f"the same {what} name is given twice")

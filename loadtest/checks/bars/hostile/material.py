"""What hostile requests and well-behaved streams are about: the demo, one token too many, and adapters that bite."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from manylora import demo
from manylora.loadtest.checks.bars.hostile.streams import Lane
from manylora.loadtest.checks.bars.material import computing

DEMO = Path(demo.__file__).parent
GOOD = ("json", "pirate", "sql")
BASE = "demo"
BEYOND = "[PAD]"
"""A token of the tokenizer whose id the model doesn't have, as a padding token that was added without resizing."""
CONFIG, WEIGHTS, TEMPLATE = "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"
STREAM_TOKENS = 96

HUGE_ALPHAS = (1e10, 1e20, 1e30, 1e37)
HUGE_WEIGHTS = (1e5, 1e18, 1e37)
PATTERNS = (
    "(.{1,99}){1,99}Z",
    ".?" * 60 + "Z",
    "(?x)( . + ) + Z",
    "(?=(.+)+Z).*",
    "(.+)+Z",
    "(.|.)*Z",
    "(?i)q_proj",
    "(?P<idx>.*)q_proj",
    r"(.*)\1\1\1Z",
    "(?:(?:(?:a?){99}){99}){99}",
    "[",
    "(" * 900 + ")" * 900,
    ".*(gate|up|down)_proj",
)
"""Most freeze a backtracking engine; some are merely odd, the last is what peft's users write."""
PATTERN_FIELDS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 2000000000 }}",
    "{{ 'a'|indent(10**10) }}",
    "{% set x = namespace(s='a') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}",
    "{{ 9**9**9 }}",
    "{{ range(99999)|list|tojson * 9999 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{{ messages[0].__class__.__mro__ }}",
    "{{ raise_exception('no') }}",
    "{{ messages[99].content }}",
    "{% if %}",
    "{{ 1 / 0 }}",
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
)
"""Time, memory, depth, faults; some don't compile."""


@dataclass(frozen=True, slots=True)
class HostileMaterial:
    """Where it lies. Sources are paths below ``adapters``, the server's adapter root."""

    base: Path
    adapters: Path

    @classmethod
    def make(cls, directory: Path) -> "HostileMaterial":
        """Write all of it."""
        made = cls(directory / BASE, directory / "adapters")
        shutil.copytree(DEMO / "base", made.base)
        _add_token(made.base / "tokenizer.json", _vocab_size(made.base))
        for name in GOOD:
            shutil.copytree(DEMO / "adapters" / name, made.adapters / name)
        _huge(made.adapters)
        _patterns(made.adapters)
        _templates(made.adapters)
        _odd_configs(made.adapters)
        _odd_files(made.adapters)
        return made

    def kind(self, prefix: str) -> list[str]:
        """Return the sources that begin so."""
        return sorted(path.name for path in self.adapters.glob(f"{prefix}-*"))

    def arguments(self, kernels: str) -> list[str]:
        """Return the server's flags. Exact, so that an answer has one value; small, so that it is crowded."""
        return [
            *("--adapter-root", str(self.adapters), *computing(kernels)),
            *("--threads", "1", "--log-level", "error", "--kv-cache-gib", "0.1", "--arena-rows", "256"),
        ]


def lanes() -> tuple[Lane, ...]:
    """Return the well-behaved: a greedy client and one that samples with a seed, for the base and each good adapter."""
    questions = (
        "How many users?",
        "Tell me about ships. " * 12,
        "List all orders over 100 from last year. " * 6,
    )
    made = []
    for model in (BASE, *GOOD):
        for temperature in (0.0, 0.8):
            bodies = tuple(
                json.dumps(_chat(model, question, temperature, number)).encode()
                for number, question in enumerate(questions)
            )
            made.append(Lane(f"{model}, {'greedy' if temperature == 0 else 'sampled'}", bodies))
    return tuple(made)


def _chat(model: str, question: str, temperature: float, seed: int) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": STREAM_TOKENS,
        "temperature": temperature,
        "seed": seed,
        "ignore_eos": True,
        "logprobs": True,
        "stream": True,
    }


def _vocab_size(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text())["vocab_size"])


def _add_token(path: Path, token_id: int) -> None:
    tokenizer = json.loads(path.read_text())
    added = {**tokenizer["added_tokens"][0], "id": token_id, "content": BEYOND}
    tokenizer["added_tokens"].append(added)
    path.write_text(json.dumps(tokenizer))


def _copy(adapters: Path, name: str, **changes: object) -> Path:
    """Copy the pirate, with these fields of its config."""
    directory = adapters / name
    shutil.copytree(DEMO / "adapters" / "pirate", directory)
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **changes}))
    return directory


def _huge(adapters: Path) -> None:
    for number, alpha in enumerate(HUGE_ALPHAS):
        _copy(adapters, f"huge-alpha{number}", lora_alpha=alpha)
    for number, factor in enumerate(HUGE_WEIGHTS):
        for part in ("lora_A", "lora_B"):
            path = _copy(adapters, f"huge-{part}{number}") / WEIGHTS
            tensors = {
                name: (tensor.float() * (factor if part in name else 1)).clamp(-3e38, 3e38)
                for name, tensor in load_file(path).items()
            }
            save_file(tensors, path, metadata={"format": "pt"})


def _patterns(adapters: Path) -> None:
    for number, pattern in enumerate(PATTERNS):
        for field in PATTERN_FIELDS:
            changes: dict[str, object] = {field: pattern}
            if field in ("rank_pattern", "alpha_pattern"):
                changes = {field: {pattern: 16}}
            elif field == "layers_pattern":
                changes = {field: [pattern], "layers_to_transform": [0]}
            _copy(adapters, f"pattern-{number}-{field}", **changes)
    _copy(adapters, "pattern-many", rank_pattern={f".*{number}.*": 16 for number in range(10_000)})
    _copy(adapters, "pattern-list", target_modules=[f"(.+)+{number}" for number in range(10_000)])


def _templates(adapters: Path) -> None:
    for number, template in enumerate(TEMPLATES):
        (_copy(adapters, f"template-{number}") / TEMPLATE).write_text(template)
    (_copy(adapters, "template-large") / TEMPLATE).write_text("{{ 'a' }}" * 1_000_000)
    (_copy(adapters, "template-object") / "tokenizer_config.json").write_text(
        '{"chat_template": {"name": 5}}'
    )


def _odd_configs(adapters: Path) -> None:
    texts = {
        "alpha-digits": '{"peft_type": "LORA", "r": 16, "target_modules": ["q_proj"], "lora_alpha": '
        + "9" * 401
        + "}",
        "deep": "[" * 100_000,
        "not-json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "list": "[]",
        "half": '{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}',
    }
    for name, text in texts.items():
        (_copy(adapters, f"config-{name}") / CONFIG).write_text(text)
    changes: dict[str, dict[str, object]] = {
        "rank": {"r": 10**9},
        "rank-text": {"r": "16"},
        "alpha-infinite": {"lora_alpha": float("inf")},
        "alpha-nan": {"lora_alpha": float("nan")},
        "dora": {"use_dora": True},
        "replication": {"layer_replication": [[0, 10**9]]},
        "layers": {"layers_to_transform": list(range(100_000))},
        "targets": {"target_modules": []},
        "kind": {"peft_type": "IA3"},
        "saved": {"modules_to_save": ["lm_head"]},
    }
    for name, change in changes.items():
        _copy(adapters, f"config-{name}", **change)


def _odd_files(adapters: Path) -> None:
    """Write weights whose headers lie, are huge, or hold what can't be served."""
    tensor = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    headers = {
        "spaces": b"{" + b" " * (63 << 20) + b"}",
        "many": b"{" + b",".join(tensor % number for number in range(1_000_000)) + b"}",
        "deep": b"[" * (8 << 20),
        "numbers": b'{"t":{"dtype":"F32","shape":[' + b"9" * (4 << 20) + b'],"data_offsets":[0,0]}}',
        "overflow": b'{"t":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}',
        "empty": b"{}",
        "metadata": b'{"__metadata__":{"a":"' + b"a" * (8 << 20) + b'"}}',
    }
    for name, header in headers.items():
        path = _copy(adapters, f"header-{name}") / WEIGHTS
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    whole = (DEMO / "adapters" / "pirate" / WEIGHTS).read_bytes()
    contents = {
        "lies": (2**63 - 1).to_bytes(8, "little") + whole[8:],
        "cut": whole[:-1],
        "longer": whole + b"\0",
        "nothing": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "pickle": b"\x80\x04.",
    }
    for name, content in contents.items():
        (_copy(adapters, f"header-{name}") / WEIGHTS).write_bytes(content)
    path = _copy(adapters, "header-nan") / WEIGHTS
    tensors = {name: torch.full_like(value, float("nan")) for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    outside = _copy(adapters, "header-link") / WEIGHTS
    outside.unlink()
    outside.symlink_to("/etc/hostname")

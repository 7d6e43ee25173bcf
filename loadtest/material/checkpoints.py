"""Random checkpoints on disk: a base model with its tokenizer, and PEFT adapters for it. No training, no download.

What they answer is noise, but each adapter's noise is its own, the same on every run, and different from the base's.
Needs torch, safetensors, transformers and tokenizers only, so that a bare GPU machine can make them too.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Bpe
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from manylora.adapters.tokenizer import load_tokenizer

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOKENIZER_FILES = (
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "*.jinja",
    "added_tokens.json",
)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = (*ATTENTION, *MLP)
SMALLEST_VOCABULARY = 256 + 3


@dataclass(frozen=True, slots=True)
class BaseShape:
    """The sizes of a base model; ``family`` is a model_type of transformers: qwen2, qwen3, llama or mistral."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_position: int
    tied: bool = True
    """Whether the head is the embedding."""
    rope_theta: float = 10000.0

    def config(self, eos_token_id: int) -> PretrainedConfig:
        """Return transformers' config."""
        return AutoConfig.for_model(
            self.family,
            architectures=[ARCHITECTURES[self.family]],
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            max_position_embeddings=self.max_position,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=self.tied,
            eos_token_id=eos_token_id,
            bos_token_id=None,
        )


ARCHITECTURES: Mapping[str, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
TINY = BaseShape("qwen2", 320, 128, 192, 2, 4, 2, 1024)
"""0.4 M weights: a step takes about a millisecond."""
QWEN25_0_5B = BaseShape("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, rope_theta=1e6)
QWEN25_7B = BaseShape("qwen2", 152064, 3584, 18944, 28, 28, 4, 32768, tied=False, rope_theta=1e6)
LLAMA31_8B = BaseShape("llama", 128256, 4096, 14336, 32, 32, 8, 131072, tied=False, rope_theta=5e5)
SHAPES: Mapping[str, BaseShape] = {
    "tiny": TINY,
    "qwen2.5-0.5b": QWEN25_0_5B,
    "qwen2.5-7b": QWEN25_7B,
    "llama3.1-8b": LLAMA31_8B,
}


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """One random LoRA adapter. Equal shapes (with the seed) on one base give equal files."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Of ALL_LINEAR."""
    seed: int = 0
    strength: float = 0.5
    """Size of its delta beside W x of the random base, both as root mean squares. From about 0.2 on, greedy
    answers differ from the base's and between adapters within a few tokens."""
    rslora: bool = False
    """Whether the scale is alpha/√rank and not alpha/rank (2312.03732)."""
    dora: bool = False
    """Whether it brings a length for each row of the base (2402.09353): around 1, as the random base's are."""
    invocation: tuple[int, ...] = ()
    """Token ids from whose last occurrence in a prompt on it acts (aLoRA, 2504.12397); (): it always does."""

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def write_base(
    directory: Path,
    shape: BaseShape = TINY,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
    shard_bytes: int = 1 << 30,
    device: torch.device | str = "cpu",
) -> Path:
    """Write config.json, model*.safetensors with their index, and a tokenizer; return ``directory``.

    Matrices are noise of standard deviation 1/√in, norms lie around 1, biases are not zero: nothing can be left out
    unnoticed. Memory held is one shard of ``shard_bytes`` plus one tensor. ``device`` is where the noise is made: CUDA
    is quicker for the large shapes, and gives other noise than the CPU. ``tokenizer`` is a directory whose tokenizer
    is copied; else one of ``shape.vocab_size`` tokens is made.

    Raises ValueError if the vocabulary is smaller than the tokenizer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        eos = write_tokenizer(directory, shape.vocab_size)
    else:
        eos = copy_tokenizer(tokenizer, directory, shape.vocab_size)
    config = shape.config(eos)
    config.dtype = dtype
    config.save_pretrained(directory)
    generator = torch.Generator(device).manual_seed(seed)
    _write_shards(directory, _base_tensors(config, dtype, generator), shard_bytes)
    return directory


def write_adapter(
    directory: Path, base: Path, shape: AdapterShape, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors for the checkpoint in ``base``; return ``directory``.

    Raises ValueError for a target that is not a linear layer of the base.
    """
    linears = linear_shapes(base)
    chosen = {path: size for path, size in linears.items() if path.rsplit(".", 1)[-1] in shape.targets}
    unknown = set(shape.targets) - set(ALL_LINEAR)
    if unknown or not chosen:
        raise ValueError(f"targets must be some of {', '.join(ALL_LINEAR)}, not {shape.targets}")
    generator = torch.Generator().manual_seed(shape.seed)
    spread = shape.strength / (shape.rank**0.5 * shape.scale)
    tensors: dict[str, Tensor] = {}
    for path, (out, wide) in chosen.items():
        a = torch.randn(shape.rank, wide, generator=generator) * wide**-0.5
        b = torch.randn(out, shape.rank, generator=generator) * spread
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.to(dtype)
        if shape.dora:
            length = 1 + shape.strength / 2 * torch.randn(out, generator=generator)
            tensors[f"base_model.model.{path}.lora_magnitude_vector"] = length.to(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "use_rslora": shape.rslora,
        "use_dora": shape.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(shape.targets),
        "alora_invocation_tokens": list(shape.invocation) or None,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory


def linear_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of every linear layer that an adapter may target, by its path in the model."""
    config = json.loads((base / "config.json").read_text())
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    sizes = {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (kv_heads * head_dim, hidden),
        "v_proj": (kv_heads * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_proj": (middle, hidden),
        "up_proj": (middle, hidden),
        "down_proj": (hidden, middle),
    }
    return {
        f"model.layers.{layer}.{'mlp' if name in MLP else 'self_attn'}.{name}": size
        for layer in range(config["num_hidden_layers"])
        for name, size in sizes.items()
    }


def write_tokenizer(directory: Path, vocab_size: int) -> int:
    """Write a byte-level BPE tokenizer of ``vocab_size`` tokens and a ChatML template; return the end token's id.

    It has the 256 bytes, then as many runs of one to five lower-case letters (with a space before them or not) as fit,
    then the three control tokens, which come last. So every text can be written and every id is some text.

    Raises ValueError under SMALLEST_VOCABULARY tokens or over some 12 million.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"a byte-level vocabulary has at least {SMALLEST_VOCABULARY} tokens, not {vocab_size}"
        )
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = list(islice(_merges(), vocab_size - SMALLEST_VOCABULARY))
    if len(merges) < vocab_size - SMALLEST_VOCABULARY:
        raise ValueError(f"{vocab_size} tokens are more than this tokenizer can have")
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    bpe = Bpe(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, IM_START, IM_END)]
    )
    outer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    outer.save_pretrained(directory)
    return vocab_size - 1


def copy_tokenizer(source: Path, directory: Path, vocab_size: int) -> int:
    """Copy another checkpoint's tokenizer; return its end token's id. Raises ValueError if it has too many tokens."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copy(path, directory / path.name)
    copied = load_tokenizer(directory)
    if len(copied) > vocab_size:
        raise ValueError(f"the tokenizer has {len(copied)} tokens, the model {vocab_size}")
    if copied.eos_token_id is None:
        raise ValueError(f"the tokenizer in {source} names no end token")
    return int(copied.eos_token_id)


def _merges() -> Iterator[tuple[str, str]]:
    """Yield merges whose parts are letters or results of earlier merges."""
    space = "Ġ"  # how byte-level BPE writes a space
    for length in range(1, 6):
        for letters in product(ascii_lowercase, repeat=length):
            *first, last = letters
            yield space + "".join(first), last
        if length == 5:
            return
        for letters in product(ascii_lowercase, repeat=length + 1):
            *first, last = letters
            yield "".join(first), last


def _base_tensors(
    config: PretrainedConfig, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # a tied head appears once, as the embedding
        size = tuple(parameter.shape)
        noise = torch.randn(size, generator=generator, device=generator.device, dtype=torch.float32)
        if len(size) == 2:
            noise *= size[1] ** -0.5
        else:
            noise *= 0.1
            if "norm" in name:
                noise += 1
        yield name, noise.to(dtype).cpu()


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write shards under the names that transformers gives them, and their index."""
    sizes: list[int] = []
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(held, directory / f"shard-{len(sizes)}.tmp", metadata={"format": "pt"})
        places.update(dict.fromkeys(held, len(sizes)))
        sizes.append(sum(tensor.nbytes for tensor in held.values()))
        held.clear()

    for name, tensor in tensors:
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
    flush()
    # Their number stands in their names, and is known only now.
    names = [f"model-{i + 1:05}-of-{len(sizes):05}.safetensors" for i in range(len(sizes))]
    if len(sizes) == 1:
        names = ["model.safetensors"]
    for number, name in enumerate(names):
        (directory / f"shard-{number}.tmp").replace(directory / name)
    if len(sizes) > 1:
        index = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {tensor: names[number] for tensor, number in places.items()},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

"""`manylora bench peft`: what transformers + peft (+ bitsandbytes for NF4) do with the same batch, tuned as it can be.

One left-padded batch with an adapter a row (`adapter_names`), KV cache, sdpa attention, eval and inference mode, the
adapters in the model's own dtype. All prompts are of one length, so nothing is padded, and all answers too, so no row
idles: the best case of a static batch. bitsandbytes picks its own kernels. Needs bitsandbytes for NF4 only.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora.loadtest.bench.workload import Planned, Workload, token_prompt
from manylora.loadtest.material.checkpoints import ALL_LINEAR, SHAPES, write_base
from manylora.loadtest.material.quiet import advice_off
from manylora.loadtest.material.random_model import DTYPES, ModelChoice

BASE_ROW = "__base__"
"""peft's name for rows without an adapter."""


@dataclass(frozen=True, slots=True)
class PeftBench:
    """What to measure."""

    model: ModelChoice
    workload: Workload
    adapters: int
    """0: the base alone, without peft."""
    rank: int
    directories: tuple[Path, ...] = ()
    """PEFT directories of the adapters; else ``adapters`` ones are made of noise, on all linear layers."""
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse directories that aren't there: peft would look for them on the hub."""
        for path in self.directories:
            if not (path / "adapter_config.json").is_file():
                raise ValueError(f"{path} holds no adapter_config.json")


@dataclass(frozen=True, slots=True)
class PeftResult:
    """What came out, without the warm-up."""

    batches: int
    output_tokens: int
    seconds: float
    how: str

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second, prompts included in the time."""
        return self.output_tokens / self.seconds


def run_peft(bench: PeftBench) -> PeftResult:
    """Load, warm up with one batch and run the workload in batches of ``streams`` rows.

    Raises ImportError if peft, or bitsandbytes for NF4, is not installed.
    """
    torch.manual_seed(bench.workload.seed)
    with advice_off():
        base = _base_model(bench.model)
        # Every row is to have all its tokens: no end token, and no processor that masks one.
        base.generation_config.eos_token_id = None
        model = _with_adapters(bench, base)
    work, device = bench.workload, torch.device(bench.model.device)
    names = _adapter_names(bench)
    plan = work.plan(len(names))
    batches = [plan[first : first + work.streams] for first in range(0, len(plan), work.streams)]
    with torch.inference_mode(), advice_off():
        _generate(model, bench, work.warm_up(len(names), work.streams), names)
        began = time.perf_counter()
        tokens = sum(_generate(model, bench, batch, names) for batch in batches)
        seconds = time.perf_counter() - began
    return PeftResult(len(batches), tokens, seconds, _how(bench, device))


def _generate(model: Any, bench: PeftBench, batch: list[Planned], names: list[str]) -> int:
    """Generate one batch; return its number of new tokens. ``model`` is transformers' or peft's, without types."""
    work, device = bench.workload, torch.device(bench.model.device)
    vocab = int(model.config.vocab_size)
    prompts = [token_prompt(each.prompt, work.input_tokens, vocab, work.seed) for each in batch]
    ids = torch.tensor(prompts, device=device)
    options: dict[str, object] = {
        "max_new_tokens": work.output_tokens,
        "do_sample": bench.temperature > 0,
        "use_cache": True,
        "pad_token_id": 0,
    }
    if bench.temperature > 0:
        options |= {"temperature": bench.temperature, "top_p": bench.top_p, "top_k": 0}
    if names != [BASE_ROW]:
        options["adapter_names"] = [names[each.model] for each in batch]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    new = out.shape[1] - ids.shape[1]
    if new != work.output_tokens:
        raise RuntimeError(f"transformers generated {new} tokens a row, not {work.output_tokens}")
    return int(out.shape[0] * new)


def _adapter_names(bench: PeftBench) -> list[str]:
    count = len(bench.directories) or bench.adapters
    return [f"adapter{number}" for number in range(count)] or [BASE_ROW]


def _base_model(choice: ModelChoice) -> Any:
    if choice.source in SHAPES and choice.quantization == "none":
        return _noise_model(choice)
    if choice.source not in SHAPES:
        return _loaded_model(Path(choice.source), choice)
    # bitsandbytes quantises while loading, so there must be files to load.
    with tempfile.TemporaryDirectory(prefix="manylora-bench-") as scratch:
        write_base(Path(scratch), SHAPES[choice.source], dtype=DTYPES[choice.dtype], device=choice.device)
        return _loaded_model(Path(scratch), choice)


def _noise_model(choice: ModelChoice) -> Any:
    from transformers import AutoModelForCausalLM

    shape = SHAPES[choice.source]
    config = shape.config(shape.vocab_size - 1)
    with torch.device(choice.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[choice.dtype], attn_implementation="sdpa"
        )
    return model.eval()


def _loaded_model(directory: Path, choice: ModelChoice) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, object] = {}
    if choice.quantization == "nf4":
        import bitsandbytes  # noqa: F401  # transformers' own error about a missing one is a page long

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[choice.dtype]
        )
        options["device_map"] = {"": choice.device}
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[choice.dtype], attn_implementation="sdpa", local_files_only=True, **options
    )
    return model.to(choice.device).eval() if not options else model.eval()


def _with_adapters(bench: PeftBench, model: Any) -> Any:
    names = _adapter_names(bench)
    if names == [BASE_ROW]:
        return model
    from peft import LoraConfig, PeftModel, get_peft_model

    # peft would otherwise hold 16-bit adapters in float32 and cast in every layer.
    keep = {"autocast_adapter_dtype": False}
    if bench.directories:
        first, *others = bench.directories
        adapted = PeftModel.from_pretrained(model, first, adapter_name=names[0], **keep)
        for name, directory in zip(names[1:], others, strict=True):
            adapted.load_adapter(directory, adapter_name=name, **keep)
    else:
        config = LoraConfig(
            r=bench.rank, lora_alpha=bench.rank, target_modules=list(ALL_LINEAR), init_lora_weights=False
        )
        adapted = get_peft_model(model, config, adapter_name=names[0], **keep)
        for name in names[1:]:
            adapted.add_adapter(name, config, **keep)
    dtype = DTYPES[bench.model.dtype]
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return adapted.eval()


def _how(bench: PeftBench, device: torch.device) -> str:
    linear = "bitsandbytes NF4" if bench.model.quantization == "nf4" else f"{bench.model.dtype} weights"
    adapters = "no adapters" if _adapter_names(bench) == [BASE_ROW] else "adapter_names, a row each"
    return (
        f"transformers generate, one batch of {bench.workload.streams}, {linear}, sdpa, {adapters}, {device}"
    )

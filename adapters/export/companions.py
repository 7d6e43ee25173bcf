"""The files beside a merged model's weights: configs, tokenizer, chat template, how texts are pooled, model card."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from manylora.adapters.export.nf4_layout import quantization_config
from manylora.adapters.export.outline import EMBEDDING, QUANTIZATION_FIELDS
from manylora.adapters.export.write import OutputForm
from manylora.adapters.files import MODULES_FILE, POOLING_FILE, TOKENIZER_JSON
from manylora.adapters.tokenizer import TokenizerRefused, load_tokenizer
from manylora.adapters.tokens import TEMPLATE_FILE, TOKENIZER_FILE, read_chat_template
from manylora.quant.served_form import SECTION
from manylora.quant.weight_files import NAMED

MANIFEST = "manylora_export.json"
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_FILE,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
    "chat_template.json",
)
_GENERATION = "generation_config.json"


def merged_config(
    config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], form: OutputForm, *, tied: bool
) -> dict[str, object]:
    """Return the merged model's config.json: the base's, but for what the merge changed."""
    dropped = (*QUANTIZATION_FIELDS, SECTION, "_name_or_path", NAMED)  # NAMED: a file that is not written
    made = {key: value for key, value in config.items() if key not in dropped}
    name = str(form.dtype).removeprefix("torch.")
    made["dtype"] = name
    if "torch_dtype" in made:  # for readers from before transformers 5
        made["torch_dtype"] = name
    made["tie_word_embeddings"] = tied
    made["vocab_size"] = shapes[EMBEDDING][0]
    if form.four_bit:
        made["quantization_config"] = quantization_config(form.dtype, double_quant=form.double_quant)
    return made


def write_config(directory: Path, config: Mapping[str, object]) -> None:
    """Write config.json."""
    _write_json(directory / "config.json", config)


def copy_texts(base: Path, brought: Sequence[Path], directory: Path, *, vocab_size: int) -> None:
    """Copy generation config, tokenizer, chat template and how texts are pooled.

    What the adapter, or a mixture's parts, bring (in ``brought``) wins, as when they are served: tokenizer and template
    are alike in all of them. A tokenizer that has ids from ``vocab_size`` (the merged model's) on is left out.
    """
    copy_pooling((*brought, base), directory)
    adapter = brought[0]
    source = adapter if _brings_tokenizer(adapter, vocab_size) else base
    for name, owner in [(_GENERATION, base), *((name, source) for name in TOKENIZER_FILES)]:
        if (owner / name).is_file():
            shutil.copyfile(owner / name, directory / name)
    template = read_chat_template(adapter)
    if template is None:
        return
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    settings = directory / TOKENIZER_FILE
    if settings.is_file():
        found = json.loads(settings.read_text(encoding="utf-8"))
        if found.pop("chat_template", None) is not None:
            _write_json(settings, found)


def copy_pooling(owners: Iterable[Path], directory: Path) -> None:
    """Copy how texts are pooled from the first of ``owners`` that says it: both files, which name each other."""
    told = next((owner for owner in owners if (owner / POOLING_FILE).is_file()), None)
    if told is None:
        return
    for name in (MODULES_FILE, POOLING_FILE):
        if (told / name).is_file():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(told / name, directory / name)


def _brings_tokenizer(adapter: Path, vocab_size: int) -> bool:
    if not (adapter / TOKENIZER_JSON).is_file():
        return False
    try:
        ids = load_tokenizer(adapter).get_vocab().values()
    except TokenizerRefused:
        return False
    return max(ids, default=vocab_size) < vocab_size


def write_manifest(directory: Path, manifest: Mapping[str, object]) -> None:
    """Write the manifest."""
    _write_json(directory / MANIFEST, manifest)


def write_card(
    directory: Path, manifest: Mapping[str, object], *, base: str, adapter: str, method: str
) -> None:
    """Write README.md with the front matter that model hubs read."""
    checks = manifest["logits"]
    assert isinstance(checks, Mapping)
    # AutoTokenizer would overrule the file for some families.
    reader = "PreTrainedTokenizerFast" if (directory / TOKENIZER_JSON).is_file() else "AutoTokenizer"
    into = "its 16-bit weights" if manifest["into"] == "16bit" else "its 4-bit weights, dequantised"
    text = f"""---
base_model: {json.dumps(base)}
base_model_relation: {"quantized" if manifest["format"] == "merged-4bit" else "finetune"}
library_name: transformers
pipeline_tag: text-generation
tags:
- lora
- merged
---

# {adapter}, merged into {base}

The adapter **{adapter}** ({method}) merged into **{base}**, into {into}. The model needs neither peft nor the adapter.

| | |
| --- | --- |
| format | {manifest["format"]}, {manifest["dtype"]} |
| distance of the logits from base + adapter | {checks["relative"]:.2g} relative, {checks["max_abs"]:.2g} at most |
| same most likely token | {checks["top1"]:.0%} of the positions compared |
| of the adapter's change | {manifest["change_kept"]:.1%} survived rounding |

```python
from transformers import AutoModelForCausalLM, {reader}

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")
tokenizer = {reader}.from_pretrained("THIS_DIRECTORY")
```

or `manylora serve THIS_DIRECTORY`. How it was made and measured is in `{MANIFEST}`.
"""
    (directory / "README.md").write_text(text, encoding="utf-8")


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

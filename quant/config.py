"""Which format a checkpoint is in, by ``quantization_config``. What can't be served is refused here, by its name.

The section is in config.json; checkpoints from before that was so have it in a file beside it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from manylora.quant.errors import CorruptCheckpoint, UnsupportedQuantization
from manylora.quant.format import StoredFormat

Section = Mapping[str, object]

GPTQ_BITS = (4, 8)
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What was subtracted from zero points before they were packed, by checkpoint_format."""
DEFAULT_GROUP = 128
# Written by AutoGPTQ and AutoAWQ before config.json had a section for it.
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
SERVED = "served are 16-bit weights, bitsandbytes NF4, GPTQ with 4 or 8 bits, and AWQ (GEMM) with 4 bits"


def stored_format(directory: Path, config: Section) -> StoredFormat:
    """Tell the format of the checkpoint in ``directory``, whose config.json is ``config``.

    Raises UnsupportedQuantization naming what isn't served, CorruptCheckpoint for a section that can't be read.
    """
    if config.get("compression_config"):
        raise UnsupportedQuantization(f"quantization 'compressed-tensors' is not served; {SERVED}")
    section = config.get("quantization_config")
    if section is None:
        section = _section_beside(directory)
    if section is None:
        return StoredFormat("dense")
    if not isinstance(section, Mapping):
        raise CorruptCheckpoint(f"quantization_config is {section!r}, not an object")
    return _by_method(section)


def _by_method(section: Section) -> StoredFormat:
    method = section.get("quant_method")
    if method == "bitsandbytes" or (method is None and _any(section, "load_in_4bit", "load_in_8bit")):
        return _bitsandbytes(section)
    if method == "gptq":
        return _gptq(section)
    if method == "awq":
        return _awq(section)
    if method is None:
        raise UnsupportedQuantization(f"quantization_config has no quant_method; {SERVED}")
    raise UnsupportedQuantization(f"quantization {method!r} is not served; {SERVED}")


def _section_beside(directory: Path) -> Section | None:
    for name, method in BESIDE.items():
        path = directory / name
        if path.is_file():
            try:
                section = json.loads(path.read_text())
            except (ValueError, OSError) as error:
                raise CorruptCheckpoint(
                    f"{path} can't be read: {getattr(error, 'strerror', error)}"
                ) from None
            if not isinstance(section, dict):
                raise CorruptCheckpoint(f"{path} is not an object")
            return {"quant_method": method, **section}
    return None


def _bitsandbytes(section: Section) -> StoredFormat:
    if _any(section, "load_in_8bit", "_load_in_8bit"):
        raise UnsupportedQuantization(f"bitsandbytes LLM.int8() (load_in_8bit) is not served; {SERVED}")
    if not _any(section, "load_in_4bit", "_load_in_4bit"):
        raise UnsupportedQuantization(f"bitsandbytes without load_in_4bit is not served; {SERVED}")
    kind = section.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise UnsupportedQuantization(f"bitsandbytes {kind} is not served; {SERVED}")
    return StoredFormat("nf4", 4, double_quant=_flag(section, "bnb_4bit_use_double_quant"))


def _gptq(section: Section) -> StoredFormat:
    bits = _number(section, "bits")
    if bits not in GPTQ_BITS:
        raise UnsupportedQuantization(f"GPTQ with {bits} bits is not served; {SERVED}")
    _check_dynamic(section.get("dynamic"))
    version = str(section.get("checkpoint_format") or section.get("format") or "gptq").lower()
    if _flag(section, "is_marlin_format"):
        version = "marlin"
    if version not in ZERO_OFFSETS:
        raise UnsupportedQuantization(
            f"GPTQ checkpoint_format {version!r} is not served; {' and '.join(ZERO_OFFSETS)} are"
        )
    return StoredFormat(
        "gptq",
        4 if bits == GPTQ_BITS[0] else 8,
        _group_size(section),
        ZERO_OFFSETS[version],
        reordered=_flag(section, "desc_act"),
    )


def _check_dynamic(dynamic: object) -> None:
    """Pass GPTQModel's rules that leave modules alone ("-:"): their names say so. Others change bits or groups."""
    rules = dynamic if isinstance(dynamic, Mapping) else {}
    other = next((rule for rule in rules if not str(rule).startswith("-:")), None)
    if other is not None:
        raise UnsupportedQuantization(
            f"GPTQ with settings of its own for {other!r} (dynamic) is not served; {SERVED}"
        )


def _awq(section: Section) -> StoredFormat:
    bits = _number(section, "bits" if "bits" in section else "w_bit", 4)
    if bits != 4:
        raise UnsupportedQuantization(f"AWQ with {bits} bits is not served; {SERVED}")
    versions = [section.get(key) for key in ("version", "format", "checkpoint_format")]
    for version in versions:
        if version is not None and str(version).lower() != "gemm":
            raise UnsupportedQuantization(f"AWQ version {version!r} is not served; {SERVED}")
    if section.get("backend") == "llm-awq":
        raise UnsupportedQuantization(f"AWQ version 'llm-awq' is not served; {SERVED}")
    if not _flag(section, "zero_point", default=True):
        raise UnsupportedQuantization(
            f"AWQ with zero_point false is not served: its GEMM layout has none; {SERVED}"
        )
    return StoredFormat("awq", 4, _group_size(section))


def _group_size(section: Section) -> int:
    size = _number(section, "group_size" if "group_size" in section else "q_group_size", DEFAULT_GROUP)
    if size is None or (size != -1 and size < 1):
        raise UnsupportedQuantization(f"group_size {size} is neither -1 nor a number of inputs")
    return size


def _number(section: Section, key: str, default: int | None = None) -> int | None:
    """Return a whole number. A text that spells one is not taken for it: transformers doesn't either."""
    value = section.get(key, default)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    hint = (
        f": write it as {value}, without quotes"
        if isinstance(value, str) and value.lstrip("-").isdigit()
        else ""
    )
    raise CorruptCheckpoint(f"quantization_config: {key} is {value!r}, which is no whole number{hint}")


def _flag(section: Section, key: str, *, default: bool = False) -> bool:
    """Return true or false; null is the default. Of texts, "false" too would count as true."""
    value = section.get(key)
    if value is None:
        return default
    if value in (0, 1):
        return bool(value)
    raise CorruptCheckpoint(f"quantization_config: {key} is {value!r}, which is neither true nor false")


def _any(section: Section, *keys: str) -> bool:
    return any(_flag(section, key) for key in keys)

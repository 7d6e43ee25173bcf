"""Writes a gguf-lora, one matrix at a time, reads it again and measures it before anyone sees it.

The container is written by the package ``gguf``, llama.cpp's own. What goes into it is gguf_lora.py's.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from manylora.adapters.export.base import DTYPES, BaseCheckpoint, read_config
from manylora.adapters.export.change import TrainedAdapter
from manylora.adapters.export.combine import difference, norm
from manylora.adapters.export.errors import ExportFailed, ExportRefused
from manylora.adapters.export.gguf_lora import GgufLora, GgufPair
from manylora.adapters.export.mixed_adapter import EXACT
from manylora.adapters.export.outline import outline_of
from manylora.adapters.export.publish import check_space
from manylora.adapters.export.rows import DenseRows
from manylora.adapters.export.settings import ExportSettings
from manylora.adapters.files import WEIGHTS_FILE, present_files
from manylora.adapters.reader import MAX_ADAPTER_BYTES
from manylora.adapters.spec import CONFIG_FILE

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap

GGUF_SUFFIX = ".gguf"
_HALVES = ("lora_a", "lora_b")


def write_gguf_lora(
    adapter: Path, settings: ExportSettings, path: Path, progress: Callable[[float], None]
) -> dict[str, object]:
    """Write the adapter in a directory to ``path`` and return its manifest. Raises AdapterError.

    ``settings`` name base and dtype; of the base config.json is read.
    """
    _need_gguf()
    if settings.base is None:
        raise ExportRefused("a gguf-lora needs the base's directory: its config.json says what the rows are")
    base = settings.base
    config = read_config(base)
    outline = outline_of(config)
    dtype = torch.float32 if settings.dtype == "auto" else DTYPES[settings.dtype]
    trained = TrainedAdapter(adapter, outline)
    lora = GgufLora(trained, config, outline, lambda name: _is_copied(trained, base, name))
    files = present_files(adapter, MAX_ADAPTER_BYTES)
    check_space(path.parent, 2 * files[WEIGHTS_FILE])
    _write(lora, settings, path, dtype, lambda share: progress(share / 2))
    error = _error(lora, path, lambda share: progress(0.5 + share / 2))
    if not error <= EXACT[dtype]:
        raise ExportFailed(
            f"the file is {error:.2g} (relative) from the adapter, over the tolerance of {EXACT[dtype]:g}; nothing was"
            " published"
        )
    return {
        "manylora": version("manylora"),
        "format": settings.format,
        "dtype": str(dtype).removeprefix("torch."),
        "architecture": lora.architecture,
        "alpha": lora.alpha,
        "modules": len(lora.names),
        "adapter": {"name": settings.name, **trained.describe()},
        "error": {"overall": error},
        "left_out": sorted(files.keys() - {CONFIG_FILE, WEIGHTS_FILE}),
        "versions": {"torch": torch.__version__, "gguf": version("gguf")},
    }


def _is_copied(adapter: TrainedAdapter, base: Path, name: str) -> bool:
    whole = adapter.whole(name)
    rows = BaseCheckpoint(base).rows(name)
    return (
        isinstance(rows, DenseRows) and whole is not None and torch.equal(whole.float(), rows.weight.float())
    )


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ExportRefused("a gguf-lora needs the package gguf: pip install 'manylora[gguf]'") from None


def _write(
    lora: GgufLora,
    settings: ExportSettings,
    path: Path,
    dtype: torch.dtype,
    progress: Callable[[float], None],
) -> None:
    from gguf import GGUFType, GGUFValueType, GGUFWriter, Keys

    with closing(GGUFWriter(path, lora.architecture)) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_name(settings.name)
        writer.add_float32(Keys.Adapter.LORA_ALPHA, lora.alpha)
        if lora.invocation:
            ids = list(lora.invocation)
            key = Keys.Adapter.ALORA_INVOCATION_TOKENS
            writer.add_key_value(key, ids, GGUFValueType.ARRAY, GGUFValueType.UINT32)
        names = _names(lora)
        # Twice through the adapter: the file's head has the shapes of all.
        for pair in lora.pairs():
            for half, tensor in _halves(pair):
                _announce(writer, f"{names[pair.path]}.weight.{half}", tensor, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, pair in enumerate(lora.pairs(), 1):
            for _, tensor in _halves(pair):
                writer.write_tensor_data(_rounded(pair.path, tensor, dtype))
            progress(number / len(lora.names))


def _names(lora: GgufLora) -> Mapping[str, str]:
    """Return what llama.cpp calls each module. Raises ExportRefused for one that it doesn't know."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == lora.architecture)
    known: TensorNameMap = get_tensor_name_map(architecture, lora.num_layers)
    found = {}
    for name in lora.names:
        path = name.removesuffix(".weight")
        there = known.get_name(path)
        if there is None:
            raise ExportRefused(f"llama.cpp has no name for {path}")
        found[path] = there
    return found


def _halves(pair: GgufPair) -> tuple[tuple[str, Tensor], ...]:
    return tuple(zip(_HALVES, (pair.a, pair.b), strict=True))


def _announce(writer: "GGUFWriter", name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    from gguf import GGMLQuantizationType as Stored

    stored = {torch.float32: Stored.F32, torch.float16: Stored.F16, torch.bfloat16: Stored.BF16}[dtype]
    nbytes = tensor.numel() * dtype.itemsize
    writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), nbytes, raw_dtype=stored)


def _rounded(
    path: str, tensor: Tensor, dtype: torch.dtype
) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
    made = tensor.to(dtype)
    if not bool(torch.isfinite(made).all()):
        raise ExportFailed(f"{path} overflows {dtype}; give a wider --dtype")
    # numpy has no bfloat16: its bits.
    return (made.view(torch.int16) if dtype == torch.bfloat16 else made).numpy()


def _error(lora: GgufLora, path: Path, progress: Callable[[float], None]) -> float:
    """Return ‖file - adapter‖ / ‖adapter‖ over all matrices, Frobenius: what llama.cpp would compute with the file."""
    from gguf import GGUFReader, dequantize

    names, off, size = _names(lora), 0.0, 0.0
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    if len(stored) != 2 * len(names):
        raise ExportFailed(
            "the file that was written has other tensors than the adapter; nothing was published"
        )
    for number, (module, name) in enumerate(names.items(), 1):
        a, b = (
            torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
            for tensor in (stored[f"{name}.weight.{half}"] for half in _HALVES)
        )
        pair = GgufPair(module, a, b)
        wanted = lora.wanted(pair)
        off, size = off + difference(lora.meant(pair), wanted) ** 2, size + norm(wanted) ** 2
        progress(number / len(names))
    return sqrt(off) / sqrt(size) if size > 0 else float(off > 0)

"""The base model of a server: where its files are, on which device and in which type it runs, and loading it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from manylora import demo
from manylora.adapters.base_form import BaseForm
from manylora.doctor import cpu_has_bf16
from manylora.quant.config import stored_format
from manylora.quant.errors import CheckpointMissing
from manylora.quant.hub import find_checkpoint
from manylora.quant.identity import config_fingerprint, weights_identity
from manylora.quant.served_form import served_form
from manylora.server.config import ServeSettings
from manylora.server.kernels.choose import AUTO, COST, PLAIN, choose_backend, what_is_missing
from manylora.server.kernels.cpu.library import KernelsRefused
from manylora.server.kernels.cpu.pack import CannotPack
from manylora.server.model.config import ModelConfig
from manylora.server.model.decoder import Decoder
from manylora.server.model.errors import ModelMissing
from manylora.server.model.loader import LoadReport, load_weights, quantised_at_load, read_config
from manylora.server.model.weight_cache import WEIGHTS, WeightCache

DEMO = Path(demo.__file__).resolve().parent
GIB = 1 << 30
KV_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base."""

    config: ModelConfig
    decoder: Decoder
    report: LoadReport
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    """Hash of config.json: what adapters were registered for before there was ``identity``."""
    identity: str
    """Of config.json and the weights: what its adapters are registered for."""
    cache: WeightCache | None
    """Where prepared weights are kept."""
    why_plain: str | None = None
    """Why torch computes on a CPU although nobody asked for that, and what it costs."""

    @property
    def kv_dtype(self) -> str:
        """In which type keys and values are kept."""
        return str(self.decoder.backend.kv_dtype).removeprefix("torch.")

    @property
    def form(self) -> BaseForm:
        """How its linear layers are held."""
        return BaseForm(self.report.kind, self.report.double_quant)


def find_base(name: str) -> Path:
    """Return the directory of a model: itself, or downloaded from the hub. Raises ModelMissing with what to do."""
    try:
        return find_checkpoint(name)
    except CheckpointMissing as error:
        raise ModelMissing(str(error)) from None


def load_base(settings: ServeSettings, directory: Path, progress: Callable[[int, int], None]) -> BaseModel:
    """Load the model in ``directory`` as the settings say."""
    device = _device(settings)
    dtype = _dtype(settings.dtype, device, directory)
    if device.type != "cpu" and settings.activations != "int8":
        raise ValueError(
            f"{settings.name_of('activations')}: the model runs on {device.type}, not on CPU kernels"
        )
    kernels, flag = kernels_for(settings, dtype, directory), settings.name_of("kernels")
    kv_dtype = kv_dtype_for(settings)

    cache = weight_cache(settings)

    def load(kernels: str) -> tuple[Decoder, LoadReport]:
        of_cpu = settings.threads, settings.activations
        backend = choose_backend(device, dtype, kernels, *of_cpu, kv_dtype, cuda_graphs=settings.cuda_graphs)
        config, weights, report = load_weights(
            directory,
            backend,
            quantization=settings.quantization,
            double_quant=settings.double_quant,
            progress=progress,
            cache=cache,
        )
        return Decoder(config, weights, backend), report

    try:
        decoder, report = load(kernels)
        why_plain = what_is_missing(decoder.backend, kernels)
    except KernelsRefused as error:
        raise ValueError(f"{flag} {error}") from None
    except CannotPack as error:
        if kernels != AUTO:
            raise ValueError(f"{flag} {kernels}: {error}; {flag} plain takes it") from None
        decoder, report = load(PLAIN)
        why_plain = f"the native CPU kernels don't take this base: {error}. {COST}"
    known_by = config_fingerprint(directory), weights_identity(directory)
    return BaseModel(decoder.config, decoder, report, device, dtype, *known_by, cache, why_plain)


def weight_cache(settings: ServeSettings) -> WeightCache | None:
    """Return where prepared weights are kept; None: they aren't."""
    most = int(settings.weight_cache_gib * GIB)
    return WeightCache(settings.data_dir / WEIGHTS, most) if settings.weight_cache else None


def what_is_lost(settings: ServeSettings, directory: Path) -> tuple[str, ...]:
    """Return sentences on what a merged model in ``directory`` loses when it is served so; () if nothing."""
    raw = read_config(directory)
    own = served_form(raw)
    if own is None:
        return ()
    quantised = quantised_at_load(stored_format(directory, raw), own, settings.quantization)
    return own.costs(_dtype(settings.dtype, _device(settings), directory), quantised=quantised)


def kernels_for(settings: ServeSettings, dtype: torch.dtype, directory: Path) -> str:
    """Return which kernels are to compute. Native ones hold 16-bit weights no finer than bfloat16 does.

    So by themselves they don't take a model in which more was asked for: ``--exact``, another ``--dtype``, or one whose
    own config says that it is served in that.
    """
    if settings.exact and settings.kernels not in (AUTO, PLAIN):
        raise ValueError(f"{settings.name_of('exact')} computes in plain torch: leave out --kernels")
    if settings.activations != "int8" and (settings.exact or settings.kernels == PLAIN):
        activations = settings.name_of("activations")
        raise ValueError(
            f"{activations} is for native kernels; plain torch has those of {settings.name_of('dtype')}"
        )
    if settings.kernels != AUTO:
        return settings.kernels
    raw = read_config(directory)
    stored = stored_format(directory, raw)
    held = quantised_at_load(stored, served_form(raw), settings.quantization) or stored.kind
    finer = settings.dtype not in ("auto", "bfloat16") or (held == "dense" and dtype != torch.bfloat16)
    return PLAIN if settings.exact or finer else AUTO


def kv_dtype_for(settings: ServeSettings) -> torch.dtype | None:
    """Return in which type keys and values are to be kept; None: as the backend does by itself."""
    asked = settings.kv_cache_dtype
    if settings.exact and asked != AUTO:
        raise ValueError(
            f"{settings.name_of('exact')} keeps keys and values as they are computed: leave out"
            f" {settings.name_of('kv_cache_dtype')} {asked}"
        )
    return KV_DTYPES.get(asked)


def _device(settings: ServeSettings) -> torch.device:
    choice = settings.device
    if choice == "cuda" and not torch.cuda.is_available():
        raise ModelMissing(
            f"{settings.name_of('device')} cuda: torch sees no CUDA device; `manylora doctor` says what there is"
        )
    return torch.device(
        "cuda" if choice == "cuda" or (choice == "auto" and torch.cuda.is_available()) else "cpu"
    )


def _dtype(choice: str, device: torch.device, directory: Path) -> torch.dtype:
    if choice != "auto":
        return DTYPES[choice]
    usual = torch.bfloat16 if device.type == "cuda" or cpu_has_bf16() else torch.float32
    own = served_form(read_config(directory))
    return usual if own is None else own.dtype_for(usual, cpu=device.type == "cpu")

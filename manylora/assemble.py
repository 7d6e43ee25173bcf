"""Puts a server together from its settings: model, pools, engine, catalog, API. Starts nothing."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from manylora.adapters.audit import FILE as AUDIT_FILE
from manylora.adapters.base_form import trained_otherwise
from manylora.adapters.errors import AdapterError
from manylora.adapters.kept_norms import KeptNorms
from manylora.adapters.pairing import open_adapters
from manylora.adapters.pooling import read_pooling
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.store import AdapterStore
from manylora.adapters.types import ModuleShape
from manylora.auto import make_routing
from manylora.base import DEMO, BaseModel, load_base
from manylora.home import BaseIdentity, claim, find_home
from manylora.pools import GIB, Sizes, context_of, measure
from manylora.server.api.app import Application, create_app
from manylora.server.api.audit import AuditLog
from manylora.server.api.dependencies import ApiDependencies, ApiSettings
from manylora.server.api.engine_metrics import EngineMetrics
from manylora.server.api.metrics import Metrics
from manylora.server.api.pacing import Rests
from manylora.server.batches.files import FileStore
from manylora.server.batches.runner import Batches
from manylora.server.catalog import AdapterCatalog, CatalogObserver, CatalogSettings, WithChanges
from manylora.server.chat.templates import ChatTemplates
from manylora.server.config import ServeSettings
from manylora.server.engine.adapter_readers import as_they_are
from manylora.server.engine.async_engine import AsyncEngine
from manylora.server.engine.engine import Engine, EngineSettings
from manylora.server.engine.grammar import Grammars
from manylora.server.engine.request import Pooling
from manylora.server.engine.residency import Load
from manylora.server.engine.step_plan import SchedulerLimits
from manylora.server.exports.job import ExportedBase
from manylora.server.exports.jobs import ExportJobs
from manylora.server.kernels.pinned import pinned
from manylora.server.model.decoder_base import DecoderBase
from manylora.server.model.served import ServedModel
from manylora.server.model.vocabulary import vocabulary_of
from manylora.server.named_arguments import AdapterArgument
from manylora.server.tenants.ring import KeyRing
from manylora.server.tokenizer import ModelTexts, Tokenizer
from manylora.ways_in import finding_of, on_demand_of

CPU_STEP_CONTEXT, STEP_CONTEXT = 4096, 1 << 20
"""Context tokens of a step by device: about 10 ms of attention in the demo on a core; elsewhere they cost little."""
MIB = 1 << 20
TOKENS_NAMED = 5
"""Tokens that a log line names."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready to be run."""

    app: Application
    engine: AsyncEngine
    catalog: AdapterCatalog
    deps: ApiDependencies
    base: BaseModel
    sizes: Sizes
    other_homes: tuple[Path, ...]
    """Where adapters of other bases of this name are kept, if this base is new here."""


def start_adapters(settings: ServeSettings) -> tuple[AdapterArgument, ...]:
    """Return the adapters to register at start: those of the flags, and the demo's if it is served."""
    bundled: tuple[AdapterArgument, ...] = ()
    if settings.base is None:
        directories = sorted(path for path in (DEMO / "adapters").iterdir() if path.is_dir())
        bundled = tuple(AdapterArgument(f"{path.name}={path}") for path in directories)
    return (*settings.adapters, *bundled)


def assemble(
    settings: ServeSettings, directory: Path, name: str, progress: Callable[[int, int], None]
) -> Server:
    """Load the base in ``directory`` and build everything around it. Call on the event loop."""
    pooling = _pooling(settings, directory)
    base = load_base(settings, directory, progress)
    context = context_of(settings, base)
    sizes = measure(settings, base, context)
    # What the KV cache can't hold no request can have.
    context = min(context, sizes.num_blocks * settings.block_size)
    tokenizer = Tokenizer(directory)
    _tell_unknown_tokens(tokenizer, base.config.vocab_size)
    metrics = Metrics(name, settings.max_adapter_labels)
    observer = EngineMetrics(metrics)
    engine = AsyncEngine(
        lambda load: _engine(settings, base, sizes, tokenizer, load, observer),
        settings.max_waiting,
        context,
        observer,
        settings.audit_after,
        pinned if base.device.type == "cuda" else as_they_are,
    )
    home = _open_home(settings, base, name)
    templates = ChatTemplates(settings.template_timeout)
    texts = ModelTexts(tokenizer, directory, base.config.vocab_size, templates, home.store.path_of)
    routing = make_routing(settings, base, name, directory, home.examples, texts)
    told = WithChanges(metrics, routing.look)
    catalog = _catalog(settings, base, name, engine, home, told, texts, sizes.arena_rows, directory)
    observer.scrape(engine, catalog, name, settings.block_size, base.kv_dtype)
    api = _api_settings(settings, base, name, context, pooling)
    exports = ExportJobs(home.exports, _exported(settings, base, directory, name), home.store.path_of)
    rests = Rests(lambda: engine.tempo is not None)
    keys, batches = KeyRing(home.registry.keys), _batches(settings, home.batches)
    audit = AuditLog(settings.audit_log or settings.data_dir / AUDIT_FILE)
    grammars = Grammars(base.config.vocab_size)
    shared = (engine, catalog, tokenizer, texts, metrics, api, rests, keys, batches)
    on_demand = on_demand_of(settings)
    deps = ApiDependencies(*shared, exports, audit, on_demand, grammars=grammars, routing=routing)
    return Server(create_app(deps, version("manylora")), engine, catalog, deps, base, sizes, home.other_homes)


def _batches(settings: ServeSettings, directory: Path) -> Batches:
    files = FileStore(directory, largest=int(settings.max_file_mib * MIB), most=int(settings.files_gib * GIB))
    largest_line = int(settings.max_body_mib * MIB)
    return Batches(files, in_flight=settings.batch_in_flight, largest_line=largest_line)


def _pooling(settings: ServeSettings, directory: Path) -> Pooling:
    """Return how texts are pooled where neither request nor adapter says. Raises ValueError."""
    if settings.pooling != "auto":
        return Pooling(settings.pooling)
    try:
        return Pooling(read_pooling(directory) or Pooling.LAST.value)
    except AdapterError as error:
        raise ValueError(
            f"the base says how its texts are pooled, and that isn't served: {error}; {settings.name_of('pooling')} "
            "last or mean goes over that"
        ) from error


def _api_settings(
    settings: ServeSettings, base: BaseModel, name: str, context: int, pooling: Pooling
) -> ApiSettings:
    return ApiSettings(
        base_model=name,
        context_length=context,
        vocab_size=base.config.vocab_size,
        api_keys=settings.api_key,
        admin_key=settings.admin_key,
        hosts=tuple(host.lower() for host in (settings.host, *settings.allowed_host)),
        cors_origins=settings.cors_origin,
        max_body_bytes=int(settings.max_body_mib * MIB),
        max_choices=settings.max_choices,
        max_sequences=settings.max_sequences,
        max_prompt_logprobs=settings.max_prompt_logprobs,
        max_tokenize_characters=settings.max_tokenize_characters,
        keep_alive_seconds=settings.keep_alive_seconds,
        tool_parser=None if settings.tool_parser == "auto" else settings.tool_parser,
        base_source=settings.base or "",
        pooling=pooling,
        matryoshka=settings.matryoshka,
        hidden_size=base.config.hidden_size,
        shares=settings.shares,
        share_prefixes=settings.share_prefixes,
        created=int(time.time()),
    )


def _tell_unknown_tokens(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Log which tokens the tokenizer knows and the model has no row for."""
    unknown = tokenizer.ids_beyond(vocab_size)
    if unknown:
        log.warning(
            "the tokenizer knows %d tokens beyond the model's vocabulary of %d (%s%s): prompts with one are refused",
            len(unknown),
            vocab_size,
            ", ".join(map(repr, list(unknown)[:TOKENS_NAMED])),
            ", …" if len(unknown) > TOKENS_NAMED else "",
        )


def _engine(
    settings: ServeSettings,
    base: BaseModel,
    sizes: Sizes,
    tokenizer: Tokenizer,
    load: Load,
    observer: EngineMetrics,
) -> Engine:
    decoder = base.decoder
    kv, arena = decoder.new_kv(sizes.num_blocks, settings.block_size), decoder.new_arena(sizes.arena_rows)
    step_context = CPU_STEP_CONTEXT if base.device.type == "cpu" else STEP_CONTEXT
    limits = SchedulerLimits(
        max_running=settings.max_running,
        max_step_tokens=settings.max_step_tokens,
        adapter_timeout=settings.adapter_timeout,
        max_step_context=settings.max_step_context or step_context,
    )
    sizes_of_engine = EngineSettings(
        vocab_size=base.config.vocab_size,
        num_blocks=sizes.num_blocks,
        block_size=settings.block_size,
        arena_rows=sizes.arena_rows,
        host_bytes=int(settings.host_cache_gib * GIB),
        row_bytes=decoder.backend.row_bytes(base.config.shape),
        limits=limits,
        vocabulary_bytes=int(settings.vocabulary_gib * GIB),
    )
    model = ServedModel(decoder, kv, arena)
    return Engine(
        model,
        arena,
        tokenizer.vocabulary,
        tokenizer.eos_ids,
        sizes_of_engine,
        base.device,
        load,
        observer,
    )


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a base has in the data directory."""

    registry: AdapterRegistry
    store: AdapterStore
    exports: Path
    batches: Path
    examples: Path
    inherited_up_to: int
    other_homes: tuple[Path, ...]


def _open_home(settings: ServeSettings, base: BaseModel, name: str) -> _Kept:
    identity = BaseIdentity(name, base.fingerprint, base.identity)
    try:
        home = find_home(settings.data_dir, identity)
        registry, store = open_adapters(home.directory, reserved=(name,), start_anew=settings.start_anew)
        inherited = home.inherited_up_to
        if inherited is None:
            inherited = max((record.id for record in registry.active()), default=0)
            claim(home.directory, identity, inherited_up_to=inherited)
        return _Kept(
            registry,
            store,
            home.directory / "exports",
            home.directory / "batches",
            home.directory / "examples",
            inherited,
            home.others,
        )
    except (OSError, AdapterError, ValueError) as error:
        raise ValueError(
            f"{settings.name_of('data_dir')} {settings.data_dir} can't be used: {error}"
        ) from None


def _exported(settings: ServeSettings, base: BaseModel, directory: Path, name: str) -> ExportedBase:
    """Return what is served, so that a merge can be held against it."""
    return ExportedBase(
        directory,
        {
            "base_name": name,
            "double_quant": settings.double_quant,
            "served_dense": base.report.kind == "dense",
            "served_dtype": str(base.dtype).removeprefix("torch."),
        },
    )


def _norms(base: BaseModel, store: AdapterStore) -> KeptNorms:
    """Return the lengths of the base's rows as it is served."""
    form = f"{base.report.format}, {base.decoder.backend.rows_form}"
    return KeptNorms(DecoderBase(base.decoder), form, store.derived)


def _catalog(
    settings: ServeSettings,
    base: BaseModel,
    name: str,
    engine: AsyncEngine,
    home: _Kept,
    observer: CatalogObserver,
    texts: ModelTexts,
    arena_rows: int,
    directory: Path,
) -> AdapterCatalog:
    modules = {
        path: ModuleShape(*shape, base.config.has_bias(path))
        for path, shape in base.config.base_modules().items()
    }
    catalog = CatalogSettings(
        base_names=(name,),
        finding=finding_of(settings, frozenset(str(argument.path) for argument in start_adapters(settings))),
        download_workers=settings.download_workers,
        max_source_bytes=int(settings.max_source_gib * GIB),
        modules=modules,
        max_rank=settings.max_rank,
        dtype=base.dtype,
        vocab_size=base.config.vocab_size,
        check_text=texts.check,
        is_busy=lambda: engine.tempo is not None,
        inherited_up_to=home.inherited_up_to,
        base_template=texts.base_template,
        check_alike=texts.check_alike,
        max_mixture_parts=settings.max_mixture_parts,
        note_on=lambda trained: trained_otherwise(trained, base.form, from_16bit=base.report.from_16bit),
        arena_rows=arena_rows,
        norms=_norms(base, home.store),
        keep_versions=settings.keep_versions,
        vocabulary=vocabulary_of(directory, base.config, base.decoder.weights),
        vocabulary_bytes=int(settings.vocabulary_gib * GIB),
    )
    return AdapterCatalog(engine, home.registry, home.store, catalog, observer)

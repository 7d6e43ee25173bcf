"""What a server says once it listens: what was loaded, in how many bits, how much memory, how much room."""

from collections.abc import Iterator, Sequence

from manylora.adapters.names import list_names
from manylora.assemble import Server
from manylora.pools import GIB
from manylora.server.catalog import CatalogEntry
from manylora.server.config import ServeSettings

MIB = 1 << 20


def banner(server: Server, settings: ServeSettings, name: str, url: str) -> dict[str, str]:
    """Return the banner's rows by their names."""
    base, sizes, report = server.base, server.sizes, server.base.report
    rows: dict[str, str] = {}
    linear = f"{report.format}, {report.bits_per_weight:.2f} bits a weight, {_size(report.linear_bytes)}"
    where = f"{base.device.type}, {str(base.dtype).removeprefix('torch.')}"
    how = "mapped" if report.mapped else "loaded"
    rows["base"] = f"{name}: {base.config.num_layers} layers, {how} in {report.seconds:.1f} s"
    rows["linear layers"] = linear
    rows["embedding, head"] = _size(report.other_bytes)
    rows["runs on"] = f"{where}; {base.decoder.backend.description}"
    tokens = sizes.num_blocks * settings.block_size
    blocks = f"{tokens:,} tokens in {sizes.num_blocks:,} blocks"
    rows["KV cache"] = f"{blocks}, {_size(sizes.kv_bytes)}, {base.kv_dtype}"
    context, most = server.deps.settings.context_length, base.config.max_position
    of = f" of the base's {most:,}" if context < most else ""
    less = "" if settings.max_model_len or not of else ": the KV cache holds no more"
    rows["context"] = f"{context:,} tokens{of}{less}"
    rows["rank arena"] = f"{sizes.arena_rows:,} rows a module, {_size(sizes.arena_bytes)}"
    rows["adapters"] = _adapters(server.catalog.list())
    mixed = _first([entry.record.name for entry in server.catalog.mixtures()])
    if mixed:
        rows["mixtures"] = mixed
    places = ", ".join((str(settings.adapter_root.resolve()), *settings.allow_source))
    rows["new adapters from"] = f"{places} (POST {url}/adapters)"
    if settings.watch is not None:
        rows["follows"] = str(settings.watch.absolute())
    if settings.resolve is not None:
        rows["looks for models in"] = settings.resolve
    rows["listening"] = f"{url}/v1  (docs: {url}/docs)"
    return rows


def warnings_at_start(server: Server, settings: ServeSettings) -> Iterator[str]:
    """Yield what whoever started the server may not expect, one sentence each."""
    yield from server.base.report.notes
    if server.base.why_plain is not None:
        yield server.base.why_plain
    noted: dict[str, list[str]] = {}
    for entry in server.catalog.list():
        for sentence in entry.notes:
            noted.setdefault(sentence, []).append(entry.record.name)
    for sentence, names in noted.items():
        yield f"of {len(names)} adapters ({list_names(names)}) each was {sentence}"
    for home in server.other_homes:
        yield (
            f"{home} holds adapters of another base of this name (other weights, or another config.json): they are"
            " not served on this one; register here those that are for it"
        )
    if settings.listens_beyond_loopback and settings.admin_key is None:
        yield (
            f"the server listens on {settings.host}, and without --admin-key adapters can't be managed from beyond this"
            " machine (403; from outside a container neither): set --admin-key, in the environment MANYLORA_ADMIN_KEY"
        )


def _adapters(entries: Sequence[CatalogEntry]) -> str:
    shown = _first([entry.record.name for entry in entries])
    inherited = sum(entry.inherited is not None for entry in entries)
    otherwise = sum(entry.trained_otherwise is not None for entry in entries)
    told = [f"{inherited} perhaps for other weights than these"] if inherited else []
    told += [f"{otherwise} trained on another form of the base"] if otherwise else []
    return (f"{shown} ({', '.join(told)})" if told else shown) if shown else "none"


def _first(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.1f} MiB"

"""What an adapter's header and config say of embedding and head together, by peft's rules. Reads no tensor.

peft (0.21.2) writes a module that was trained whole, one that it copies because it was targeted or resized, rows of
trained tokens, and factors, each under a name of its own; where the base's head is its embedding, some of them are the
head's too. What is told of both, and what of one alone, is decided here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.files import WEIGHTS_FILE
from manylora.adapters.header import TensorEntry
from manylora.adapters.spec import ALL_LINEAR, CONFIG_FILE, AdapterSpec
from manylora.adapters.vocabulary import EMBEDDING, HEAD, TOKEN_MODULES, BaseVocabulary, units_of

Entries = Mapping[str, TensorEntry]
_PREFIX = "base_model.model."
_ID_BYTES = 8
_OWN_TABLES = ("modules_to_save.weight", "weight")
_TABLES = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
"""A whole module, by what it is saved as: trained as such, or copied. Those before go before those after."""
_ROWS = "token_adapter.trainable_tokens_delta"
_PASSED_OVER = ("original_module.weight", "token_adapter.trainable_tokens_original")
_FACTORS = {
    EMBEDDING: ("lora_embedding_A", "lora_embedding_B"),
    HEAD: ("lora_A.weight", "lora_B.weight"),
}
TOKEN_TENSORS = tuple(
    f"{_PREFIX}{path}.{name}"
    for path in TOKEN_MODULES
    for name in (*_OWN_TABLES, *_TABLES, _ROWS, *_PASSED_OVER, *_FACTORS[path])
)
"""Names of all tensors of embedding and head that may be there."""


@dataclass(frozen=True, slots=True)
class ModuleOutline:
    """What the file has of embedding or head."""

    table: TensorEntry | None = None
    """All rows."""
    trained: tuple[int, ...] = ()
    """Ids whose rows are in ``rows``, in its order."""
    rows: TensorEntry | None = None
    rank: int = 0
    """Of the factors; 0: there are none."""
    factors: tuple[TensorEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class VocabularyOutline:
    """What an adapter changes of the vocabulary, checked as far as shapes go."""

    size: int
    """Ids that it has."""
    modules: Mapping[str, ModuleOutline] = field(default_factory=dict)
    """By each of TOKEN_MODULES."""

    def units(self, itemsize: int) -> int:
        """Return what it takes at most, in numbers of so many bytes: less, where a whole module has rows of the base's.

        Rows that embedding and head share count once.
        """
        rows = {
            (each.table, each.rows): sum(map(_numbers, (each.table, each.rows))) * itemsize
            + len(each.trained) * _ID_BYTES
            for each in self.modules.values()
        }
        factors = sum(_numbers(entry) for each in self.modules.values() for entry in each.factors)
        return units_of(sum(rows.values()) + factors * itemsize)


def _numbers(entry: TensorEntry | None) -> int:
    return 0 if entry is None else prod(entry.shape)


def split_tokens(entries: Entries) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, TensorEntry]]:
    """Part the tensors into those of each of TOKEN_MODULES, by the rest of their names, and all others.

    Raises InvalidAdapter for one that is there twice.
    """
    tokens: dict[str, dict[str, TensorEntry]] = {path: {} for path in TOKEN_MODULES}
    others: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        path, rest = _parted(name)
        if path is None:
            others[name] = entry
        elif rest in tokens[path]:
            raise _bad(f"is there twice: also as {tokens[path][rest].name!r}", entry)
        else:
            tokens[path][rest] = entry
    return tokens, others


def _parted(name: str) -> tuple[str | None, str]:
    inside = name.removeprefix(_PREFIX)
    # A model without its head (AutoModel) names the embedding from inside.
    for path, start in ((EMBEDDING, EMBEDDING), (HEAD, HEAD), (EMBEDDING, EMBEDDING.partition(".")[2])):
        if inside != name and inside.startswith(f"{start}."):
            return path, inside[len(start) + 1 :].replace(".default", "")
    return None, name


def outline_vocabulary(
    spec: AdapterSpec, tokens: Mapping[str, Entries], base: BaseVocabulary | None, max_rank: int
) -> VocabularyOutline | None:
    """Hold tensors of embedding and head against config and base; None: the adapter changes neither.

    ``tokens`` is split_tokens' first. Raises InvalidAdapter and UnsupportedAdapter, naming field or tensor.
    """
    targeted = _targeted(spec, base)
    if not (any(tokens.values()) or targeted or spec.saved_modules or spec.trained_tokens):
        return None
    if base is None:
        first = next((entry.name for entries in tokens.values() for entry in entries.values()), None)
        raise UnsupportedAdapter(
            f"the adapter changes {' or '.join(TOKEN_MODULES)}, and here only factors of the blocks' layers are taken",
            file=CONFIG_FILE if first is None else WEIGHTS_FILE,
            tensor=first,
        )
    _check_plain(spec, targeted)
    _check_tying(spec, base)
    left = {path: dict(entries) for path, entries in tokens.items()}
    modules = {path: _table_and_rows(spec, path, left[path], base) for path in TOKEN_MODULES}
    if base.tied:
        modules = _tied(spec, modules, left)
    for path in TOKEN_MODULES:
        if path in targeted:
            modules[path] = _with_factors(spec, path, modules[path], left[path], max_rank)
    _check_nothing_left(left, base)
    sizes = {path: _size(path, modules[path], base) for path in TOKEN_MODULES}
    if sizes[EMBEDDING] != sizes[HEAD]:
        raise InvalidAdapter(
            f"the embedding has rows for {sizes[EMBEDDING]} tokens and the head for {sizes[HEAD]}: save both of them "
            "with the adapter, as large as each other",
            file=WEIGHTS_FILE,
        )
    size = sizes[HEAD]
    for path, module in modules.items():
        _check_shapes(path, module, size, base)
    return VocabularyOutline(size, modules)


def _targeted(spec: AdapterSpec, base: BaseVocabulary | None) -> frozenset[str]:
    """Return which have factors. "all-linear" leaves the head out, and an embedding is no linear layer."""
    if isinstance(spec.target_modules, str) and spec.target_modules.lower() == ALL_LINEAR:
        return frozenset()
    found = frozenset(path for path in TOKEN_MODULES if spec.targets(path))
    return frozenset(TOKEN_MODULES) if found and spec.ensures_tying and base and base.tied else found


def _check_plain(spec: AdapterSpec, targeted: frozenset[str]) -> None:
    kind = "use_dora" if spec.use_dora else "alora_invocation_tokens" if spec.invocation else None
    if kind is not None and targeted:
        raise UnsupportedAdapter(
            f"{kind} is set and target_modules names {' and '.join(sorted(targeted))}: of embedding and head plain "
            "factors are served",
            file=CONFIG_FILE,
        )


def _check_tying(spec: AdapterSpec, base: BaseVocabulary) -> None:
    if not spec.ensures_tying:
        return
    if not base.tied:
        raise InvalidAdapter(
            "ensure_weight_tying is set, but this base's head is not its embedding: the adapter was made for a base "
            "that ties them",
            file=CONFIG_FILE,
        )
    trained = spec.trained_tokens
    if len(trained) == 2 and trained[EMBEDDING] != trained[HEAD]:
        raise InvalidAdapter(
            "ensure_weight_tying is set, but trainable_token_indices names other tokens for the head",
            file=CONFIG_FILE,
        )


def _table_and_rows(
    spec: AdapterSpec, path: str, left: dict[str, TensorEntry], base: BaseVocabulary
) -> ModuleOutline:
    saved = _is_saved(spec, path)
    if saved and path in spec.trained_tokens:
        raise UnsupportedAdapter(
            f"modules_to_save and trainable_token_indices both name {path}: one of the two is served",
            file=CONFIG_FILE,
        )
    order = _OWN_TABLES if saved else _TABLES
    table = next((left[name] for name in order if name in left), None)
    follows = base.tied and spec.ensures_tying and path not in spec.saved_modules
    if saved and table is None and not follows:
        raise _missing(path, _OWN_TABLES[1], "modules_to_save names it")
    for name in (*_OWN_TABLES, *_TABLES, *_PASSED_OVER):
        left.pop(name, None)
    trained = spec.trained_tokens.get(path, ())
    if not trained:
        return ModuleOutline(table)
    if _ROWS not in left:
        tied = path == HEAD and base.tied and spec.trained_tokens.get(EMBEDDING) == trained
        if not tied:
            raise _missing(path, _ROWS, "trainable_token_indices names it")
        return ModuleOutline(table)
    return ModuleOutline(table, trained, left.pop(_ROWS))


def _is_saved(spec: AdapterSpec, path: str) -> bool:
    return path in spec.saved_modules or (spec.ensures_tying and bool(spec.saved_modules))


def _tied(
    spec: AdapterSpec, modules: Mapping[str, ModuleOutline], left: Mapping[str, dict[str, TensorEntry]]
) -> dict[str, ModuleOutline]:
    """Let the head have what is the embedding's, as peft does where the base's head is its embedding."""
    embedding, head = modules[EMBEDDING], modules[HEAD]
    apart = not spec.ensures_tying
    # A copy of the base's one matrix is that of both; what was trained whole has left it.
    if head.table is None and not (apart and EMBEDDING in spec.saved_modules):
        head = replace(head, table=embedding.table)
    if embedding.table is None and not (apart and HEAD in spec.saved_modules):
        embedding = replace(embedding, table=head.table)
    if embedding.trained and spec.trained_tokens.get(HEAD, embedding.trained) == embedding.trained:
        # Rows of its own, which peft writes once the embedding was resized, are the same ones, and it reads none.
        left[HEAD].pop(_ROWS, None)
        head = replace(head, trained=embedding.trained, rows=embedding.rows)
    return {EMBEDDING: embedding, HEAD: head}


def _with_factors(
    spec: AdapterSpec, path: str, module: ModuleOutline, left: dict[str, TensorEntry], max_rank: int
) -> ModuleOutline:
    rank = spec.rank_of(path)
    if rank > max_rank:
        raise UnsupportedAdapter(
            f"rank {rank} at {path}; this server takes ranks up to {max_rank}", file=CONFIG_FILE
        )
    missing = next((name for name in _FACTORS[path] if name not in left), None)
    if missing is not None:
        raise _missing(path, missing, "target_modules names it")
    return replace(module, rank=rank, factors=tuple(left.pop(name) for name in _FACTORS[path]))


def _check_nothing_left(left: Mapping[str, Entries], base: BaseVocabulary) -> None:
    for path, entries in left.items():
        for entry in entries.values():
            tied = "is" if base.tied else "is not"
            raise _bad(
                f"is of {path}, but the config doesn't ask for it on this base, whose head {tied} its embedding",
                entry,
            )


def _size(path: str, module: ModuleOutline, base: BaseVocabulary) -> int:
    """Return how many ids a module has rows for."""
    size = base.size
    if module.table is not None:
        if len(module.table.shape) != 2:
            raise _bad(
                f"has shape {list(module.table.shape)}; expected [tokens, {base.hidden}]", module.table
            )
        size = module.table.shape[0]
    beyond = sorted(each for each in module.trained if each >= size)
    if beyond and (module.table is not None or beyond != list(range(size, size + len(beyond)))):
        raise InvalidAdapter(
            f"trainable_token_indices names the token id {beyond[0]} of {path}, which has ids below {size}; new tokens "
            "follow each other from there on",
            file=CONFIG_FILE,
        )
    return size + len(beyond)


def _check_shapes(path: str, module: ModuleOutline, size: int, base: BaseVocabulary) -> None:
    width, rank = base.hidden, module.rank
    wanted: list[tuple[TensorEntry | None, tuple[int, int]]] = [
        (module.table, (size, width)),
        (module.rows, (len(module.trained), width)),
    ]
    if module.factors:
        a, b = module.factors
        shapes = ((rank, size), (width, rank)) if path == EMBEDDING else ((rank, width), (size, rank))
        wanted += [(a, shapes[0]), (b, shapes[1])]
    for entry, shape in wanted:
        if entry is not None and entry.shape != shape:
            raise _bad(f"has shape {list(entry.shape)}; {path} of this adapter needs {list(shape)}", entry)


def _missing(path: str, name: str, why: str) -> InvalidAdapter:
    tensor = f"{_PREFIX}{path}.{name}"
    return InvalidAdapter(f"{tensor} is missing: {why}", file=WEIGHTS_FILE, tensor=tensor)


def _bad(message: str, entry: TensorEntry) -> InvalidAdapter:
    return InvalidAdapter(message, file=WEIGHTS_FILE, tensor=entry.name)

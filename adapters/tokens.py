"""What an adapter brings for texts: template, special and added tokens, a tokenizer, how they are pooled, and examples.

What it says is read and checked here as far as that needs no tokenizer; whether it goes with the base's is for who
serves it to find out (server/tokenizer/model_texts.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.files import TOKENIZER_JSON, WEIGHTS_FILE, read_json_object
from manylora.adapters.manifest import NONE, AdapterManifest, read_manifest
from manylora.adapters.pooling import Way, read_pooling

TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"
NAMES_FILE = "special_tokens_map.json"
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True)
class AdapterText:
    """What an adapter's files say about texts."""

    chat_template: str | None = None
    special_tokens: Mapping[str, str | None] = field(default_factory=dict)
    """bos_token, eos_token, … as they are named; None: the adapter says that there is none."""
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens whose ids added_tokens.json or tokenizer_config.json give."""
    has_tokenizer: bool = False
    """Whether it brings a tokenizer.json."""
    pooling: Way | None = None
    """How vectors of texts are made with it; None: it doesn't say."""
    vocab_size: int | None = None
    """Ids that its own embedding and head have rows for, if they are another number than the base's."""
    manifest: AdapterManifest = NONE
    """What it says of itself, and which prompts are its own."""

    @property
    def poolings(self) -> frozenset[Way]:
        """That as a set."""
        return frozenset() if self.pooling is None else frozenset({self.pooling})


@dataclass(frozen=True, slots=True)
class PartText:
    """What one part of a mixture brings for texts."""

    adapter: str
    """Its name, for messages."""
    text: AdapterText
    digest: str
    """Of its files."""


def read_text(directory: Path, vocab_size: int | None, own_size: int | None = None) -> AdapterText:
    """Read what an adapter brings for texts. Raises InvalidAdapter, and UnsupportedAdapter for ids that have no row.

    Many adapters carry added tokens only to repeat those of the base: ids below ``vocab_size`` pass. None: no check.
    ``own_size``: ids that its own embedding has rows for, if it has one of another size.
    """
    size = own_size or vocab_size
    config = _read(directory / TOKENIZER_FILE)
    added = {}
    for file, token, number in _added_tokens(directory, config):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise InvalidAdapter(f"token {token!r} has id {number!r}; expected an integer", file=file)
        if size is not None and number >= size:
            whose = "the base has" if own_size is None else "the embedding that it brings has"
            raise UnsupportedAdapter(
                f"token {token!r} has id {number}, but {whose} ids below {size}: save embedding and head, as large as "
                "the tokenizer needs them, with the adapter",
                file=file,
            )
        added[token] = number
    names = {
        **_special_tokens(_read(directory / NAMES_FILE), NAMES_FILE),
        **_special_tokens(config, TOKENIZER_FILE),
    }
    template = read_chat_template(directory)
    has_tokenizer = (directory / TOKENIZER_JSON).is_file()
    if own_size is not None and vocab_size is not None and own_size > vocab_size and not has_tokenizer:
        raise InvalidAdapter(
            f"it brings rows for the ids {vocab_size} to {own_size - 1}, which no tokenizer names: save the adapter's "
            f"whole tokenizer with it, as {TOKENIZER_JSON}",
            file=WEIGHTS_FILE,
        )
    pooling, manifest = read_pooling(directory), read_manifest(directory)
    return AdapterText(template, names, added, has_tokenizer, pooling, own_size, manifest)


def _read(path: Path) -> dict[str, object]:
    return read_json_object(path) if path.exists() else {}


def _added_tokens(directory: Path, config: Mapping[str, object]) -> Iterator[tuple[str, str, object]]:
    """Yield (file, token, id) of every added token whose id is told."""
    for token, number in _read(directory / TOKENS_FILE).items():
        yield TOKENS_FILE, token, number
    told = config.get("added_tokens_decoder") or {}
    if not isinstance(told, dict):
        raise InvalidAdapter("added_tokens_decoder is not an object of tokens by id", file=TOKENIZER_FILE)
    for number, token in told.items():
        name = _name(token)
        if not number.isdecimal() or name is None:
            raise InvalidAdapter(f"added_tokens_decoder has no token at {number!r}", file=TOKENIZER_FILE)
        yield TOKENIZER_FILE, name, int(number)


def _special_tokens(config: Mapping[str, object], file: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for kind in SPECIAL_TOKENS:
        if kind not in config:
            continue
        token = config[kind]
        name = _name(token)
        if name is None and token is not None:
            raise InvalidAdapter(f"{kind} is no token", file=file)
        found[kind] = name
    return found


def _name(token: object) -> str | None:
    """Return how a token is spelled: tokenizer files give it plain, or in an object with its flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def read_chat_template(directory: Path) -> str | None:
    """Return chat_template.jinja, else the (default) template of tokenizer_config.json, else None."""
    path = directory / TEMPLATE_FILE
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InvalidAdapter(f"is not UTF-8: {error}", file=TEMPLATE_FILE) from error
    path = directory / TOKENIZER_FILE
    template = read_json_object(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise InvalidAdapter("chat_template is neither text nor a list of named texts", file=TOKENIZER_FILE)
    return template

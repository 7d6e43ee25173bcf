"""With what each model's texts are made: the base's tokenizer, or that of an adapter, taken whole.

An adapter that brings a tokenizer is asked, answered and ended by it; one whose tokenizer makes the same tokens as the
base's uses the base's, with its own names of special tokens. What can't be taken whole is refused at registration.
"""

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from manylora.adapters.errors import AdapterError, InvalidAdapter, InvalidMixture, UnsupportedAdapter
from manylora.adapters.files import TOKENIZER_JSON
from manylora.adapters.tokens import TEMPLATE_FILE, TOKENIZER_FILE, AdapterText, PartText
from manylora.server.chat.templates import ChatTemplates, TemplateFailed
from manylora.server.errors import AdapterUnavailable, QueueFull
from manylora.server.tokenizer.adapter_tokenizer import AdapterTokenizer, Described
from manylora.server.tokenizer.base_tokenizer import BaseTokenizer
from manylora.server.tokenizer.model_text import ModelText, SpecialTokens
from manylora.server.tokenizer.tokenizer import Tokenizer
from manylora.server.tokenizer.tokenizer_process import TokenizerFailed
from manylora.server.tokenizer.vocabulary import Vocabulary
from manylora.server.workers.pool import WorkersBusy

MOST_TOKENIZERS = 8
"""Adapters' tokenizers whose processes are kept, the last that were used; each takes 100 to 300 MB."""
MOST_KEYS = 4096
_NAMED = 5


class ModelTexts:
    """Finds a model's text. Methods may be called from any thread."""

    def __init__(
        self,
        base: Tokenizer,
        directory: Path,
        vocab_size: int,
        templates: ChatTemplates,
        path_of: Callable[[str], Path],
    ) -> None:
        """``directory`` is the base's, ``vocab_size`` its model's; ``path_of`` says where a digest's files are."""
        self._codec = BaseTokenizer(base)
        self.base = ModelText(
            self._codec, base.vocabulary, base.special_tokens, base.eos_ids, base.fingerprint
        )
        self.base_template = base.chat_template
        self.templates = templates
        file = directory / TOKENIZER_JSON
        self._file_digest = _digest(file) if file.is_file() else None
        self._vocab_size = vocab_size
        self._path_of = path_of
        self._lock = threading.Lock()
        self._tokenizers: OrderedDict[str, AdapterTokenizer] = OrderedDict()
        self._file_digests: OrderedDict[str, str] = OrderedDict()

    async def of(self, text: AdapterText, digest: str | None, parts: Sequence[PartText] = ()) -> ModelText:
        """Return the text of the base (no digest), of an adapter, or of a mixture whose ``parts`` must be alike.

        Raises AdapterUnavailable and QueueFull, and InvalidMixture for parts that are tokenised differently.
        """
        await self.check_alike(parts)
        found = await self._of(text, digest)
        return found if text.vocab_size is None else replace(found, own_size=text.vocab_size)

    async def _of(self, text: AdapterText, digest: str | None) -> ModelText:
        if digest is None or not (text.has_tokenizer or text.special_tokens):
            return self.base
        if not text.has_tokenizer:
            return self._with_names(text)
        try:
            directory = self._path_of(digest)
            held = await asyncio.to_thread(self._held, directory, text, digest)
            if held is None:
                return self._with_names(text)
            return self._made(held, await held.describe())
        except (TokenizerFailed, AdapterError, OSError) as error:
            raise AdapterUnavailable(
                f"the adapter's tokenizer can't be used: {error}", param="model"
            ) from error
        except WorkersBusy as error:
            raise QueueFull(
                f"the adapter's tokenizer is busy: {error}; try again later", retry_after=1
            ) from error

    async def check_alike(self, parts: Sequence[PartText]) -> None:
        """Raise InvalidMixture, naming two, unless all parts are tokenised and ended alike; else as ``of`` does."""
        first: ModelText | None = None
        for part in parts:
            text = await self.of(part.text, part.digest)
            first = first or text
            difference = text.differs_in(first)
            if difference is not None:
                raise InvalidMixture(
                    f"parts {part.adapter!r} and {parts[0].adapter!r} have different {difference}: only adapters with "
                    "the same tokens can be mixed"
                )

    def check(self, directory: Path, text: AdapterText) -> None:
        """Refuse an adapter whose template or tokenizer can't be taken (blocking).

        Raises InvalidAdapter, UnsupportedAdapter, and QueueFull.
        """
        try:
            if text.chat_template is not None:
                self.templates.check(text.chat_template)
        except TemplateFailed as error:
            raise InvalidAdapter(
                f"the chat template can't be compiled: {error}", file=TEMPLATE_FILE
            ) from error
        except WorkersBusy as error:
            raise QueueFull(f"the chat template can't be compiled now: {error}", retry_after=1) from error
        held = self._held(directory, text, None) if text.has_tokenizer else None
        if held is None:
            self._check_names(text)
            if text.vocab_size is not None:
                self._check_ids(self.base.vocabulary, text)
            return
        try:
            described = held.described()
        except TokenizerFailed as error:
            self._forget(held)
            reason = str(error).replace(f"{directory}: ", "")  # the server's own place for it
            raise InvalidAdapter(f"can't be loaded: {reason}", file=TOKENIZER_JSON) from error
        except WorkersBusy as error:
            raise QueueFull(f"the tokenizer can't be loaded now: {error}", retry_after=1) from error
        try:
            self._check_ids(described.vocabulary, text)
        except UnsupportedAdapter:
            self._forget(held)
            raise

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            held = list(self._tokenizers.values())
            self._tokenizers.clear()
        for each in held:
            each.process.close()
        self._codec.close()
        self.templates.close()

    def _held(self, directory: Path, text: AdapterText, digest: str | None) -> AdapterTokenizer | None:
        """Return the adapter's tokenizer, if it isn't the base's for all that the files say."""
        file_digest = self._digest_of(directory, digest)
        if file_digest == self._file_digest and not self._names_unknown(text):
            return None
        said = sorted(text.special_tokens.items()), sorted(text.added_tokens.items())
        key = hashlib.sha256(repr((file_digest, said)).encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            held = self._tokenizers.get(key)
            if held is None:
                held = self._tokenizers[key] = AdapterTokenizer(key, directory)
            # Its first adapter may be gone, and the files with it.
            held.directory = directory
            self._tokenizers.move_to_end(key)
            oldest = (
                self._tokenizers.popitem(last=False)[1] if len(self._tokenizers) > MOST_TOKENIZERS else None
            )
        if oldest is not None:
            oldest.process.rest()
        return held

    def _forget(self, held: AdapterTokenizer) -> None:
        with self._lock:
            self._tokenizers.pop(held.key, None)
        held.process.close()

    def _digest_of(self, directory: Path, digest: str | None) -> str:
        """Return the hash of tokenizer.json; of an adapter in the store, which never changes, it is kept."""
        with self._lock:
            known = None if digest is None else self._file_digests.get(digest)
        if known is not None:
            return known
        found = _digest(directory / TOKENIZER_JSON)
        if digest is not None:
            with self._lock:
                self._file_digests[digest] = found
                while len(self._file_digests) > MOST_KEYS:
                    self._file_digests.popitem(last=False)
        return found

    def _made(self, held: AdapterTokenizer, described: Described) -> ModelText:
        if described.fingerprint == self.base.fingerprint:
            held.process.rest()
            return self._based(described.special_tokens, described.eos_id)
        return ModelText(
            held,
            described.vocabulary,
            described.special_tokens,
            self.base.eos_ids | _ids(described.eos_id),
            described.fingerprint,
        )

    def _with_names(self, text: AdapterText) -> ModelText:
        """Return the base's text with the special tokens that the adapter's files name."""
        names = {
            kind: name for kind, name in self.base.special_tokens.items() if kind not in text.special_tokens
        }
        names |= {kind: name for kind, name in text.special_tokens.items() if name is not None}
        eos = text.special_tokens.get("eos_token")
        return self._based(names, None if eos is None else self.base.vocabulary.id_of(eos))

    def _based(self, special_tokens: SpecialTokens, eos_id: int | None) -> ModelText:
        base = self.base
        return replace(base, special_tokens=special_tokens, eos_ids=base.eos_ids | _ids(eos_id))

    def _check_ids(self, vocabulary: Vocabulary, text: AdapterText) -> None:
        """Refuse tokens that have no row, and rows beyond the base's that no token names."""
        size = self._vocab_size if text.vocab_size is None else text.vocab_size
        beyond = vocabulary.ids_beyond(size)
        if beyond:
            named = ", ".join(f"{token!r} ({token_id})" for token, token_id in list(beyond.items())[:_NAMED])
            whose = (
                "the base, with ids" if text.vocab_size is None else "the embedding that it brings, with ids"
            )
            brings_one = vocabulary is not self.base.vocabulary
            tokenizer = "the adapter's tokenizer" if brings_one else "the base's tokenizer"
            advice = "" if brings_one else ", or the smaller tokenizer that it was trained with,"
            raise UnsupportedAdapter(
                f"{tokenizer} has {len(beyond)} tokens that {whose} below {size}, has no row for: {named}; "
                f"save embedding and head, as large as the tokenizer needs them,{advice} with the adapter",
                file=TOKENIZER_JSON,
            )
        if size > self._vocab_size and not vocabulary.ids_beyond(self._vocab_size):
            raise UnsupportedAdapter(
                f"the adapter brings rows for the ids {self._vocab_size} to {size - 1}, and its tokenizer has no token "
                "there: an answer could not be told; save the tokenizer that it was trained with",
                file=TOKENIZER_JSON,
            )

    def _names_unknown(self, text: AdapterText) -> Mapping[str, str]:
        """Return the tokens that the adapter's files tell of otherwise than the base's tokenizer has them."""
        known = self.base.vocabulary
        special = {name: kind for kind, name in text.special_tokens.items() if name is not None}
        unknown = {name: kind for name, kind in special.items() if known.id_of(name) is None}
        for name, token_id in text.added_tokens.items():
            if known.id_of(name) != token_id:
                unknown[name] = f"id {token_id}"
        return unknown

    def _check_names(self, text: AdapterText) -> None:
        unknown = self._names_unknown(text)
        if unknown:
            named = ", ".join(f"{name!r} ({what})" for name, what in list(unknown.items())[:_NAMED])
            raise UnsupportedAdapter(
                f"it tells of tokens that the base's tokenizer doesn't have so: {named}; save the adapter's whole "
                f"tokenizer with it, as {TOKENIZER_JSON}",
                file=TOKENIZER_FILE,
            )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _ids(token_id: int | None) -> frozenset[int]:
    return frozenset() if token_id is None else frozenset({token_id})

"""Answers conversations with the engine that serves, inside this process: what training's evaluation generates with.

The base is loaded as `manylora serve` loads it, so an evaluation's number is the one that users get. No HTTP, and no
registry that outlives the call.
"""

import asyncio
import json
import tempfile
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from manylora.adapters.errors import AdapterError
from manylora.adapters.reader import MAX_ADAPTER_BYTES
from manylora.adapters.spec import CONFIG_FILE, AdapterSpec
from manylora.assemble import Server, assemble
from manylora.base import DTYPES
from manylora.pools import GIB
from manylora.quant.errors import QuantError
from manylora.server.api.asks import ChatPrompt
from manylora.server.api.prompts import chat_tokens
from manylora.server.config import ServeSettings
from manylora.server.engine.output_stream import OutputStream
from manylora.server.engine.request import GenerationRequest, SamplingParams
from manylora.server.errors import ServerError
from manylora.server.kernels.choose import choose_backend
from manylora.server.model.errors import ModelError
from manylora.server.model.families import model_config
from manylora.server.model.loader import read_config
from manylora.server.tokenizer import Tokenizer
from manylora.training.errors import BaseRefused, InvalidData, TrainingError

T = TypeVar("T")
Message = Mapping[str, Any]
BASE, ADAPTER = "base", "evaluated"
"""Names inside this process; nobody else sees them."""
MOST_RUNNING = 32
MOST_KV_BYTES = 1 << 30
"""For the KV cache, unless a single conversation needs more: it stands beside a training run."""
BLOCK = 16
ANY_LENGTH = 1 << 30
"""Tokens of a prompt: whether it fits is told here, in words of its own."""
TEMPLATE_ROOM = 256
"""Tokens by which an adapter's own chat template may lengthen a prompt."""


@dataclass(frozen=True, slots=True)
class ServedBase:
    """Which base to serve, and how: the settings of `manylora serve` that change what it answers."""

    directory: Path
    quantization: Literal["auto", "nf4", "int8", "none"] = "auto"
    double_quant: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True, slots=True)
class _Room:
    """What a server must hold: tokens of one conversation, and rank rows of an adapter."""

    context: int
    rank: int

    def holds(self, other: "_Room") -> bool:
        return self.context >= other.context and self.rank >= other.rank


class ServedGeneration:
    """Generates greedily, all conversations in one batch. Is a manylora.training.evaluate.generate.Generate.

    The base is loaded at the first call and kept until ``close`` (or the end of a ``with`` block); it is loaded anew
    only for an adapter of a higher rank or for longer conversations than there were before.
    """

    def __init__(self, base: ServedBase) -> None:
        self._base = base
        self._tokenizer: Tokenizer | None = None
        self._loop: _LoopThread | None = None
        self._server: Server | None = None
        self._room = _Room(0, 0)
        self._requests = 0
        self._data: tempfile.TemporaryDirectory[str] | None = None

    def __call__(
        self, conversations: Sequence[Sequence[Message]], adapter: Path | None, max_new_tokens: int
    ) -> list[str]:
        """Return the text that comes next in each conversation, in their order. Raises TrainingError."""
        if not conversations:
            return []
        try:
            room = self._room_for(conversations, adapter, max_new_tokens)
            if self._loop is None:
                self._loop = _LoopThread()
            # The catalog takes paths from its root on.
            source = None if adapter is None else adapter.absolute()
            return self._loop.run(self._generate(conversations, source, max_new_tokens, room))
        except (ServerError, AdapterError) as error:
            raise TrainingError(f"the evaluation can't generate: {error}") from error
        except (ModelError, QuantError, OSError, ValueError) as error:
            raise BaseRefused(f"the base can't be served for the evaluation: {error}") from error

    def __enter__(self) -> "ServedGeneration":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the base's memory and delete the temporary files. Harmless when it is closed."""
        if self._loop is not None:
            self._loop.run(self._unload())
            self._loop.close()
            self._loop = None

    # On the caller's thread

    def _room_for(
        self, conversations: Sequence[Sequence[Message]], adapter: Path | None, max_new_tokens: int
    ) -> _Room:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._base.directory)
        # A base that never chatted is trained with a template, which the adapter brings with its tokens.
        base = self._tokenizer
        tokenizer = base if adapter is None or base.has_chat_template else Tokenizer(adapter)
        longest = max(len(tokenizer.apply_chat_template(each)) for each in conversations)
        spare = 0 if adapter is None else TEMPLATE_ROOM
        return _Room(longest + spare + max_new_tokens, 1 if adapter is None else _rank_of(adapter))

    # On the loop's thread

    async def _generate(
        self,
        conversations: Sequence[Sequence[Message]],
        adapter: Path | None,
        max_new_tokens: int,
        room: _Room,
    ) -> list[str]:
        server = await self._loaded(room)
        if adapter is None:
            return await self._answers(server, BASE, conversations, max_new_tokens)
        await server.catalog.register(ADAPTER, str(adapter), preload=True)
        try:
            return await self._answers(server, ADAPTER, conversations, max_new_tokens)
        finally:
            await server.catalog.delete(ADAPTER, abort=True)

    async def _answers(
        self, server: Server, name: str, conversations: Sequence[Sequence[Message]], max_new_tokens: int
    ) -> list[str]:
        model = server.catalog.resolve(name)
        text = await server.deps.texts.of(model.text, model.digest, model.part_texts)
        streams = []
        for conversation in conversations:
            context = server.deps.settings.context_length
            prompt = await chat_tokens(
                server.deps, model, text, ChatPrompt(messages=conversation), at_most=ANY_LENGTH
            )
            left = context - len(prompt)
            if left < 1:
                raise InvalidData(
                    f"a held-out prompt has {len(prompt)} tokens, which fills the base's context of "
                    f"{context}: leave it out of the eval data"
                )
            self._requests += 1
            request = GenerationRequest(
                request_id=f"evaluation-{self._requests}",
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(temperature=0.0, max_tokens=min(max_new_tokens, left)),
                adapters=model.adapters,
                adapter_label=model.label,
                decoder=text.vocabulary,
                eos_ids=text.eos_ids,
                vocab_size=text.own_size,
            )
            streams.append(server.engine.submit(request))
        return [await _text_of(stream) for stream in streams]

    async def _loaded(self, room: _Room) -> Server:
        if self._server is not None and self._room.holds(room):
            return self._server
        # Before the next one is loaded: two bases may not fit.
        await self._unload()
        room = _Room(max(room.context, self._room.context), max(room.rank, self._room.rank))
        self._data = tempfile.TemporaryDirectory(prefix="manylora-evaluation-")
        settings = self._settings(room, self._data.name)
        server = assemble(settings, self._base.directory, BASE, lambda done, total: None)
        server.engine.start()
        await server.catalog.restore()
        self._server, self._room = server, room
        return server

    async def _unload(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await server.engine.stop()
            await server.catalog.close()
            server.deps.texts.close()
        if self._data is not None:
            self._data.cleanup()
            self._data = None

    def _settings(self, room: _Room, data: str) -> ServeSettings:
        config = model_config(read_config(self._base.directory))
        blocks = -(-min(room.context, config.max_position) // BLOCK) + 1
        # "auto" may turn out to be 4 bytes wide; the blocks' number is worked out from the bytes again.
        backend = choose_backend(torch.device("cpu"), DTYPES.get(self._base.dtype, torch.float32))
        block = backend.block_bytes(config.shape, BLOCK)
        sequences = max(1, min(MOST_RUNNING, MOST_KV_BYTES // (blocks * block)))
        # A server's environment variables are not for this: what a run measures doesn't depend on them.
        return ServeSettings(
            base=str(self._base.directory),
            data_dir=Path(data),
            # Adapters come from wherever the trainer puts them.
            adapter_root=Path(self._base.directory.absolute().anchor),
            quantization=self._base.quantization,
            double_quant=self._base.double_quant,
            device=self._base.device,
            dtype=self._base.dtype,
            block_size=BLOCK,
            kv_cache_gib=sequences * blocks * block / GIB,
            arena_rows=room.rank + 1,  # DoRA has one more
            max_rank=room.rank,
            vocabulary_gib=MAX_ADAPTER_BYTES / GIB,
            max_running=MOST_RUNNING,
            max_waiting=1 << 30,
            # Every conversation waits its turn; none is late.
            adapter_timeout=24 * 3600.0,
        )


class _LoopThread:
    """An event loop in a thread of its own: the engine's streams need one, and a training loop has none."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="evaluation", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[object, object, T]) -> T:
        """Run ``work`` on the loop and wait for it; what it raises is raised here."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End the loop and its thread."""
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _text_of(stream: OutputStream) -> str:
    """Return all that a stream brings. Raises the stream's own error."""
    text = []
    async for outputs in stream:
        for output in outputs:
            if output.error is not None:
                raise output.error
            text.append(output.text)
    return "".join(text)


def _rank_of(adapter: Path) -> int:
    """Return the highest rank that an adapter's configuration names. Raises AdapterError, OSError, ValueError."""
    spec = AdapterSpec.parse(json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8")))
    return max([spec.rank, *spec.rank_pattern.values()])

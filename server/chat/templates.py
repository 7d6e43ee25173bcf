"""Chat templates from outside, rendered in processes of their own: time and memory are bounded while they run."""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence

from manylora.server.chat.render import Message
from manylora.server.workers.child import MOST_BYTES
from manylora.server.workers.pool import WorkerPool
from manylora.server.workers.process import WorkerDied, WorkerProcess, WorkerTimedOut

MAX_TEMPLATE_CHARACTERS = 256 * 1024
"""Length of a chat template that an adapter may bring."""
MAX_RENDERED_CHARACTERS = 16 * 1024 * 1024
"""Length of a rendered prompt; longer is refused before it is tokenised."""
WORKERS = 4
"""Processes at most; each takes about 70 MB, and is started when those that are there are busy."""
MODULE = "manylora.server.chat.worker"


class TemplateFailed(Exception):
    """A template did not give a text: it refused the messages, failed, or took too long. The message says which."""


class ChatTemplates:
    """Renders adapters' templates. Methods may be called from any thread; workers end with ``close``."""

    def __init__(self, seconds: float) -> None:
        """``seconds`` is how long one render may take."""
        self._seconds = seconds
        self._pool = WorkerPool(lambda: WorkerProcess(MODULE), size=WORKERS, seconds=seconds)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers there are."""
        return self._pool.pids

    @property
    def waiting(self) -> int:
        """Renders that wait for a worker."""
        return self._pool.waiting

    def check(self, template: str) -> None:
        """Compile a template (blocking). Raises TemplateFailed, and WorkersBusy."""
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise TemplateFailed(
                f"it has {len(template)} characters, at most {MAX_TEMPLATE_CHARACTERS} are allowed"
            )
        question = json.dumps({"template": template}).encode()
        try:
            self._text(self._pool.submit(question, _key(template)).result())
        except WorkerDied as error:
            raise self._failed(error) from error

    async def render(
        self,
        template: str,
        messages: Sequence[Message],
        variables: Mapping[str, object],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Return the prompt's text, as manylora.server.chat.render does. Raises TemplateFailed, and WorkersBusy."""
        asked = {
            "template": template,
            "messages": [dict(message) for message in messages],
            "variables": dict(variables),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "most_characters": MAX_RENDERED_CHARACTERS,
        }
        question = json.dumps(asked, ensure_ascii=False).encode()
        if len(question) > MOST_BYTES:
            raise TemplateFailed(
                f"the messages have {len(question)} bytes, at most {MOST_BYTES} are rendered"
            )
        try:
            return self._text(await asyncio.wrap_future(self._pool.submit(question, _key(template))))
        except WorkerDied as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _text(self, answer: bytes) -> str:
        said = json.loads(answer)
        if "text" in said:
            return str(said["text"])
        if "characters" in said:
            raise TemplateFailed(
                f"the rendered messages have {said['characters']} characters, "
                f"at most {MAX_RENDERED_CHARACTERS} are allowed"
            )
        raise TemplateFailed(said["error"])

    def _failed(self, error: WorkerDied) -> TemplateFailed:
        if isinstance(error, WorkerTimedOut):
            return TemplateFailed(f"it took longer than {self._seconds:g} s")
        return TemplateFailed(f"its process ended twice: {error}")


def _key(template: str) -> str:
    return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()

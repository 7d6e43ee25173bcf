"""How servers are asked for an adapter, and how they stream: OpenAI's form, LoRAX's, llama.cpp's fields on OpenAI's.

A dialect turns a model's name, a prompt and OpenAI's options into a body, says where it goes, and reads an event of the
stream. vLLM's is OpenAI's: an adapter is a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from manylora.loadtest.material.answer import Answer, Json

Endpoint = Literal["completions", "chat"]
KINDS = ("openai", "vllm", "lorax", "llama.cpp")


class Dialect(Protocol):
    """What a kind of server wants and gives."""

    @property
    def ends_with_done(self) -> bool:
        """Whether a stream that ends without [DONE] was cut off; else its last event has a finish reason."""
        ...

    def route(self, endpoint: Endpoint) -> str:
        """Return the path to ask, below the server's root."""
        ...

    def body(self, endpoint: Endpoint, model: str, prompt: str, options: Json) -> dict[str, object]:
        """Return a request's body; ``options`` are OpenAI's. Raises ValueError for a model that it can't name."""
        ...

    def take(self, answer: Answer, event: Json, now: float) -> None:
        """Take in an event of the stream that came at ``now``."""
        ...


@dataclass(frozen=True, slots=True)
class OpenAi:
    """/v1/completions and /v1/chat/completions; an adapter is a model."""

    @property
    def ends_with_done(self) -> bool:
        """See Dialect."""
        return True

    def route(self, endpoint: Endpoint) -> str:
        """See Dialect."""
        return f"/v1/{'chat/completions' if endpoint == 'chat' else 'completions'}"

    def body(self, endpoint: Endpoint, model: str, prompt: str, options: Json) -> dict[str, object]:
        """See Dialect."""
        if endpoint == "chat":
            return {"model": model, "messages": [{"role": "user", "content": prompt}], **options}
        return {"model": model, "prompt": prompt, **options}

    def take(self, answer: Answer, event: Json, now: float) -> None:
        """See Dialect."""
        usage = event.get("usage")
        if isinstance(usage, dict):
            answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
            answer.completion_tokens = usage.get("completion_tokens", answer.completion_tokens)
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            answer.add(choice, now)


@dataclass(frozen=True, slots=True)
class LlamaCpp(OpenAi):
    """llama.cpp's server: OpenAI's routes with ``lora: [{id, scale}]``, the place of an adapter in its --lora list.

    A server that was started with adapters computes all of them at scale 0 for a request that names none, so its base
    is measured on a server without any. Prompts are not kept for reuse: a run's prompts are new ones.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    """Adapters by name."""

    def body(self, endpoint: Endpoint, model: str, prompt: str, options: Json) -> dict[str, object]:
        """See Dialect."""
        if self.ids and model not in self.ids:
            raise ValueError(
                f"llama.cpp has no adapter {model!r}, it has {', '.join(self.ids)}; measure its base on a server that "
                "was started without --lora: this one would compute all adapters at scale 0"
            )
        lora = [{"id": self.ids[model], "scale": 1.0}] if self.ids else []
        named = {"lora": lora} if self.ids else {}
        # super() needs the class that slots replaced.
        return {**OpenAi.body(self, endpoint, model, prompt, options), **named, "cache_prompt": False}


@dataclass(frozen=True, slots=True)
class Lorax:
    """LoRAX's /generate_stream: the adapter is ``parameters.adapter_id``; events are single tokens."""

    base: str = "base"
    """The name that means no adapter."""

    @property
    def ends_with_done(self) -> bool:
        """See Dialect."""
        return False

    def route(self, endpoint: Endpoint) -> str:
        """See Dialect."""
        return "/generate_stream"

    def body(self, endpoint: Endpoint, model: str, prompt: str, options: Json) -> dict[str, object]:
        """See Dialect."""
        if endpoint == "chat":
            raise ValueError(
                "LoRAX's own route takes no chats: use --endpoint completions, or --server openai"
            )
        parameters: dict[str, object] = {"max_new_tokens": options.get("max_tokens"), "details": True}
        if model != self.base:
            parameters["adapter_id"] = model
        if options.get("temperature"):
            kept = {name: options[name] for name in ("temperature", "top_p", "seed") if name in options}
            parameters |= {"do_sample": True, **kept}
        if options.get("ignore_eos"):
            parameters["ignore_eos_token"] = True
        return {"inputs": prompt, "parameters": parameters}

    def take(self, answer: Answer, event: Json, now: float) -> None:
        """See Dialect."""
        token, details = event.get("token"), event.get("details")
        if isinstance(token, dict) and token.get("text") and not token.get("special"):
            answer.add({"text": token["text"]}, now)
        if isinstance(details, dict):
            answer.finish_reason = str(details.get("finish_reason") or "stop")
            answer.completion_tokens = details.get("generated_tokens", answer.completion_tokens)
            answer.prompt_tokens = details.get("prompt_tokens", answer.prompt_tokens)


def dialect_of(kind: str) -> Dialect:
    """Return the dialect of one of KINDS."""
    kinds: Mapping[str, Dialect] = {"lorax": Lorax(), "llama.cpp": LlamaCpp()}
    return kinds.get(kind, OpenAi())

"""What a server is before it is measured: which models it has, and which options it takes."""

from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.dialects import LlamaCpp, Lorax
from manylora.loadtest.material.http_client import Target, ask

REFUSED = (400, 404, 422)
CLOSED = (401, 403)
KEY_HINT = "give the server's key with --api-key or in MANYLORA_BENCH_API_KEY"


class BenchError(Exception):
    """The server can't be measured. One line: why, and what to do."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the server took when it was tried."""

    ignore_eos: bool
    usage: bool


async def choose_models(
    client: httpx.AsyncClient, target: Target, named: tuple[str, ...]
) -> tuple[Target, list[str], str]:
    """Return whom to ask, for which models, and who chose them. Raises BenchError if the server lists none."""
    if isinstance(target.dialect, LlamaCpp):
        return await _llama_cpp(client, target, named)
    if named:
        return target, list(named), "as given"
    if isinstance(target.dialect, Lorax):
        raise BenchError(f"LoRAX lists no adapters: name them with --adapters, or {target.dialect.base}")
    names, chosen_by = await _listed(client, target)
    return target, names, chosen_by


async def _llama_cpp(
    client: httpx.AsyncClient, target: Target, named: tuple[str, ...]
) -> tuple[Target, list[str], str]:
    """Find llama.cpp's adapters: [{"id", "path", "scale"}]."""
    try:
        response = await client.get(f"{target.root}/lora-adapters")
        response.raise_for_status()
        ids = {Path(str(each["path"])).stem: int(each["id"]) for each in response.json()}
    except httpx.HTTPError as error:
        raise BenchError(f"no llama.cpp answers at {target.root}: {error or type(error).__name__}") from None
    except (ValueError, LookupError, TypeError):
        raise BenchError(f"{target.root}/lora-adapters lists no adapters as llama.cpp does") from None
    names = list(named) or list(ids) or ["base"]
    if missing := [name for name in names if ids and name not in ids]:
        raise BenchError(
            f"llama.cpp has no adapter {missing[0]!r}, it has {', '.join(ids)}. Its base is measured on a server that "
            "was started without --lora: this one computes all adapters at scale 0 for it"
        )
    chosen_by = "as given" if named else "the server's --lora list" if ids else "no adapters: the base"
    return replace(target, dialect=LlamaCpp(ids)), names, chosen_by


async def _listed(client: httpx.AsyncClient, target: Target) -> tuple[list[str], str]:
    try:
        response = await client.get(f"{target.root}/v1/models")
        response.raise_for_status()
        listed = response.json()["data"]
        adapters = [str(model["id"]) for model in listed if model.get("parent")]
        names = adapters or [str(listed[0]["id"])]
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        how = KEY_HINT if status in CLOSED else "name --adapters"
        raise BenchError(f"{error.request.url} answers {status}: {how}") from None
    except httpx.HTTPError as error:
        raise BenchError(f"nothing answers at {target.root}: {error or type(error).__name__}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BenchError(f"{target.root}/v1/models lists no models: name --adapters") from None
    return names, "the server's models with a parent" if adapters else "the server's first model: no adapters"


async def negotiate(client: httpx.AsyncClient, target: Target, model: str) -> Accepted:
    """Try which options the server takes. Raises BenchError if it takes a plain request no better."""
    answer = Answer(0.0)
    for ignore_eos, usage in ((True, True), (False, True), (True, False), (False, False)):
        options: dict[str, object] = {"max_tokens": 2, "stream": True, "temperature": 0}
        options |= extras(Accepted(ignore_eos, usage))
        answer = await ask(client, target, target.body(model, "Say yes.", options))
        if answer.error is None:
            return Accepted(ignore_eos, usage and answer.completion_tokens is not None)
        if not answer.error.startswith(tuple(f"http {status}" for status in REFUSED)):
            break
    detail, kind = " ".join(answer.error_message.split()), answer.error or ""
    hint = f" ({KEY_HINT})" if kind.startswith(tuple(f"http {status}" for status in CLOSED)) else ""
    raise BenchError(f"{target.path} with model {model!r} gives: {kind}{hint}. {detail}")


def extras(accepted: Accepted) -> dict[str, object]:
    """Return the options that not every server knows."""
    extras: dict[str, object] = {"ignore_eos": True} if accepted.ignore_eos else {}
    return extras | ({"stream_options": {"include_usage": True}} if accepted.usage else {})

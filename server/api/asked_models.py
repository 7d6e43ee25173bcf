"""Which model a request asks for, and how its parts are told: in the answer, a header, and the log line."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import quote

from starlette.responses import Response

from manylora.adapters.errors import InvalidMixture
from manylora.adapters.mixtures import MixturePart, parse_mixture, shortest, spell
from manylora.adapters.names import AUTO, valid_name
from manylora.server.api.calling import current_caller, managed_catalog, seen_catalog
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.api.mixture_fields import ModelFields
from manylora.server.api.request_context import note
from manylora.server.catalog import ResolvedModel, ResolvedPart, Routed
from manylora.server.errors import AdapterUnavailable, InvalidRequest, MixtureRefused, ModelNotFound
from manylora.server.tokenizer import ModelText

HEADER, CHOICE_HEADER = "x-manylora-adapters", "x-manylora-auto"
MOST_LOOKED_FOR = 8
"""Parts of one spelled mixture that are looked for."""
ANSWERS_HEADER = "x-manylora-adapter"
_AS_THEY_ARE = " !\"#$&'()*+,/:;<=>?@[]^`{|}"
_SAID_BY_THE_CATALOG = ("model", "adapters", None)


def resolve(
    deps: ApiDependencies, model: str, fields: ModelFields, *, asker: str | None = None
) -> ResolvedModel:
    """Return what ``model`` and the fields beside it mean now; who answers is noted for the log line.

    ``asker`` says who asks, as AdapterCatalog.resolve has it; raises what that raises, with the field asked by.
    """
    if model == AUTO:
        raise InvalidRequest(
            f"model {AUTO!r} is for what is answered: chats, completions, responses and messages; name one here",
            param="model",
        )
    with told_of(fields.model_param):
        found = seen_catalog(deps).resolve(model, fields.parts, asker=asker)
    if found.parts:
        note(adapters=in_one_line(found.parts))
    elif found.itself is not None:
        note(version=found.itself.version)
    return found


async def found(
    deps: ApiDependencies, model: str, fields: ModelFields, *, asker: str | None = None
) -> ResolvedModel:
    """Return what ``model`` means, as ``resolve`` does, once what isn't registered has been looked for.

    Raises what it raises, and AdapterUnavailable for a model that is being loaded for too long.
    """
    try:
        return resolve(deps, model, fields, asker=asker)
    except ModelNotFound:
        if deps.on_demand is None:
            raise
    with told_of(fields.model_param):
        for name in _names_in(deps, model, fields):
            if deps.catalog.kind_of(name) is None and _may_have_looked_for(name):
                await deps.on_demand.look_for(managed_catalog(deps), name)
    return resolve(deps, model, fields, asker=asker)


def _names_in(deps: ApiDependencies, model: str, fields: ModelFields) -> list[str]:
    """Return the names that a request asks by: a model's own, and those of a mixture's parts."""
    if fields.parts:
        return [part.adapter for part in fields.parts]
    try:
        spelled = parse_mixture(model, lambda name: deps.catalog.kind_of(name) is not None)
    except InvalidMixture:
        return [model]
    return list(dict.fromkeys([model, *(part.adapter for part in spelled)][: 1 + MOST_LOOKED_FOR]))


def _may_have_looked_for(name: str) -> bool:
    """Return whether the caller may have an adapter loaded under a name.

    A tenant may for a name that it may use: of its own namespace, where it counts as its own, or of nobody's.
    """
    caller = current_caller()
    if not valid_name(name):
        return False
    return caller.sees_all or (
        caller.may_use(name) and ("/" not in name or name.startswith(f"{caller.tenant}/"))
    )


async def text_of(deps: ApiDependencies, model: ResolvedModel, fields: ModelFields) -> ModelText:
    """Return what the model's texts are made with. Raises what ModelTexts.of raises, with the field asked by."""
    with told_of(fields.model_param):
        return await deps.texts.of(model.text, model.digest, model.part_texts)


@contextmanager
def told_of(param: str) -> Iterator[None]:
    """Have errors about a mixture or its parts name the field that they were given in."""
    try:
        yield
    except InvalidMixture as error:
        raise MixtureRefused(str(error), param=param) from error
    except (ModelNotFound, AdapterUnavailable, InvalidRequest) as error:
        if error.param in _SAID_BY_THE_CATALOG:
            error.param = param
        raise


def told_parts(model: ResolvedModel) -> dict[str, object]:
    """Return the fields of an answer that name a mixture's parts and tell how a model was chosen; others have none."""
    parts: dict[str, object] = {}
    if model.parts:
        parts["adapters"] = [describe_part(part) for part in model.parts]
    return parts if model.routed is None else {**parts, "auto": describe_choice(model.routed)}


def describe_choice(routed: Routed) -> dict[str, object]:
    """Return how a model was chosen, as answers tell it."""
    second = routed.second
    return {
        "model": routed.name,
        "score": round(routed.score, 4),
        "nearest": routed.nearest,
        "threshold": routed.threshold,
        "second": None if second is None else {"model": second.name, "score": round(second.score, 4)},
        "prompt_tokens": routed.prompt_tokens,
    }


def describe_part(part: ResolvedPart | MixturePart) -> dict[str, object]:
    """Return a part as answers tell it; one that isn't there has neither id nor version."""
    if isinstance(part, MixturePart):
        return {"name": part.adapter, "id": None, "version": None, "weight": shortest(part.weight)}
    weight = shortest(part.weight)
    return {"name": part.name, "id": part.adapter_id, "version": part.version, "weight": weight}


def describe_asked(part: MixturePart) -> dict[str, object]:
    """Return a part of a named mixture as it was asked for, and as it may be asked for again."""
    return {"adapter": part.adapter, "weight": shortest(part.weight)}


def in_one_line(parts: Sequence[ResolvedPart]) -> str:
    """Return the parts as ``name@version#id:weight``, joined by ``+``: names hold no ``@``, ``#`` or ``+``."""
    named = [MixturePart(f"{part.name}@{part.version}#{part.adapter_id}", part.weight) for part in parts]
    return spell(named)


def headers_of(model: ResolvedModel) -> Mapping[str, str]:
    """Return the headers of an answer that say who answers: name and version, a mixture's parts, how it was chosen."""
    # A base may be called anything; a header is ASCII.
    found = {ANSWERS_HEADER: quote(model.answers, safe=_AS_THEY_ARE)}
    if model.parts:
        found[HEADER] = in_one_line(model.parts)
    if model.routed is not None:
        name = quote(model.routed.name, safe=_AS_THEY_ARE)
        found[CHOICE_HEADER] = f"{name};score={model.routed.score:.4f}"
    return found


def with_parts(response: Response, model: ResolvedModel) -> Response:
    """Return the response, with the headers that say who answers."""
    response.headers.update(headers_of(model))
    return response

"""/openapi.json: what FastAPI finds in the routes, with what it can't: bodies, answers, errors and keys.

Routes read bodies themselves, so that size, encoding and errors are ours; what they answer is documented.py's.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from manylora.server.api.answers import ErrorAnswer
from manylora.server.api.asked_models import ANSWERS_HEADER, CHOICE_HEADER, HEADER
from manylora.server.api.dependencies import ApiSettings
from manylora.server.api.documented import ERRORS, EVENTS, GENERATES, JSON, OPERATIONS, Documented

COMPONENTS = "#/components/schemas/{model}"
PATTERNS = {"job": "export-[0-9a-f]{16}"}
"""What some names in paths look like: with another the path is none of the route's."""
RETRY_AFTER = {"retry-after": {"description": "Seconds", "schema": {"type": "integer"}}}
ANSWERS = {
    CHOICE_HEADER: {
        "description": "What the model auto was this time, and how near the prompt was: NAME;score=0.8312",
        "schema": {"type": "string"},
    },
    ANSWERS_HEADER: {
        "description": "Who answered: name@version, a mixture's parts as name@version:weight joined by +, or the base",
        "schema": {"type": "string"},
    },
    HEADER: {
        "description": "A mixture's parts, as name@version#id:weight joined by +",
        "schema": {"type": "string"},
    },
}
REQUEST_ID = {"x-request-id": {"description": "The request's id", "schema": {"type": "string"}}}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI fragment that documents a JSON body of ``model``."""
    schema = model.model_json_schema(ref_template=COMPONENTS)
    definitions = schema.pop("$defs", {})
    inlined = _inline(schema, definitions)
    return {"requestBody": {"required": True, "content": {JSON: {"schema": inlined}}}}


def document(app: FastAPI, settings: ApiSettings) -> dict[str, Any]:
    """Return the description of ``app``'s routes, each of which documented.py must know."""
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            documented = OPERATIONS[method, path]
            operation["responses"] = _responses(method, documented)
            operation["security"] = _security(documented, settings)
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in PATTERNS and parameter["in"] == "path":
                    parameter["schema"]["pattern"] = f"^{PATTERNS[parameter['name']]}$"
            if documented.door == "api" and documented.errors >= GENERATES:
                operation["responses"]["200"]["headers"] |= ANSWERS
            if 202 in documented.answers:
                operation["responses"]["202"]["headers"]["location"] = {"schema": {"type": "string"}}
    models = {model for each in OPERATIONS.values() for model in each.models} | {ErrorAnswer}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "serialization") for model in ordered], ref_template=COMPONENTS
    )
    bearer = {"type": "http", "scheme": "bearer"}
    found["components"] = {
        "schemas": definitions["$defs"],
        "securitySchemes": {
            "apiKey": {
                **bearer,
                "description": "A key of --api-key, one of the registry's, or the admin key.",
            },
            "adminKey": {
                **bearer,
                "description": "The key of --admin-key, or one of the registry's that may manage or administer.",
            },
        },
    }
    return found


def _responses(method: str, documented: Documented) -> dict[str, Any]:
    responses = {str(status): _error(status) for status in documented.all_errors(method)}
    for status, media in documented.answers.items():
        content = {kind: _content(kind, model) for kind, model in media.items()}
        if status in ERRORS:  # as well as the envelope
            also = responses[str(status)]["content"][JSON]["schema"]
            content[JSON]["schema"] = {"anyOf": [content[JSON]["schema"], also]}
        said = {"description": ERRORS.get(status, "As asked"), "headers": dict(REQUEST_ID)}
        responses[str(status)] = {**said, "content": content}
    return dict(sorted(responses.items()))


def _error(status: int) -> dict[str, Any]:
    headers = {**REQUEST_ID, **(RETRY_AFTER if status in (429, 503) else {})}
    content = {JSON: {"schema": _reference(ErrorAnswer)}}
    return {"description": ERRORS[status], "headers": headers, "content": content}


def _content(kind: str, model: type[BaseModel] | None) -> dict[str, Any]:
    if model is None:
        text: dict[str, Any] = {"type": "string"}
        return {"schema": text if kind.startswith("text/") else {**text, "format": "binary"}}
    if kind != EVENTS:
        return {"schema": _reference(model)}
    # OpenAPI 3.2's word for each of a sequence, which FastAPI uses in 3.1 as well.
    event = {"anyOf": [_reference(model), _reference(ErrorAnswer)]}
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": event}
    either = {"anyOf": [{"const": "[DONE]"}, data]}
    return {"itemSchema": {"type": "object", "required": ["data"], "properties": {"data": either}}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": COMPONENTS.format(model=model.__name__)}


def _security(documented: Documented, settings: ApiSettings) -> list[dict[str, list[str]]]:
    """Return which keys open an operation on this server; without one set, a key may be sent all the same."""
    admin = {"adminKey": list[str]()}
    if documented.door == "open":
        return []
    if documented.door == "admin":
        return [admin] if settings.admin_key is not None else [{}, admin]
    return [{"apiKey": []}, admin] if settings.api_keys else [{}, {"apiKey": []}]


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        reference = node.get("$ref")
        if isinstance(reference, str):
            return _inline(definitions[reference.rsplit("/", 1)[-1]], definitions)
        inlined = {key: _inline(value, definitions) for key, value in node.items()}
        return _with_nulls(inlined) if inlined.get("type") == "object" else inlined
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    return node


def _with_nulls(schema: dict[str, Any]) -> dict[str, Any]:
    """Say that null passes wherever a field may be left out."""
    required = schema.get("required", ())
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return schema
    return {
        **schema,
        "properties": {
            name: value if name in required else _nullable(value) for name, value in properties.items()
        },
    }


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    null = {"type": "null"}
    if null in schema.get("anyOf", ()):
        return schema
    said = ("title", "description", "default")
    outer = {key: value for key, value in schema.items() if key in said}
    inner = {key: value for key, value in schema.items() if key not in said}
    return {**outer, "anyOf": [*(inner["anyOf"] if set(inner) == {"anyOf"} else [inner]), null]}

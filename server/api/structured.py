"""The fields that hold answers to a grammar, OpenAI's and vLLM's, and the one grammar that they ask for."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import from_json

from manylora.server.api.inert import BODY, Passing, refused
from manylora.server.api.mixture_fields import ModelFields
from manylora.server.api.strict import Strict
from manylora.server.engine.grammar import Grammar, GrammarKind, GrammarRefused, check_size
from manylora.server.errors import InvalidRequest

MAX_CHOICES = 1024
MAX_CHOICE = 16 << 10
"""Characters of the choices together."""
ANY_OBJECT = '{"type": "object"}'
Schema = dict[str, Any]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
]
WHITESPACE = "white space between parts of JSON is bounded as it is"


class JsonSchemaFormat(Strict):
    """A schema as OpenAI's response_format gives it."""

    passing: ClassVar[Passing] = Passing(inert={}, unread=frozenset())

    name: str = Field(
        "", max_length=64, pattern="^[a-zA-Z0-9_-]*$", description="Says what it is; changes nothing."
    )
    description: str | None = Field(None, description="The same.")
    schema_: Schema | None = Field(None, alias="schema", description="Left out: any object.")
    strict: bool = Field(False, description="Answers are held to the schema either way.")


class ResponseFormat(Strict):
    """What an answer is to be."""

    passing: ClassVar[Passing] = Passing(
        inert={}, unread=frozenset(), unserved={"schema": "it goes into json_schema, with type json_schema"}
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("json_schema goes with type json_schema, and with no other")
        return self


class StructuredOutputs(Strict):
    """vLLM's structured_outputs."""

    passing: ClassVar[Passing] = Passing(
        inert={
            "disable_any_whitespace": (False,),
            "disable_additional_properties": (False,),
            "disable_fallback": (False, True),
        },
        unread=frozenset(),
        unserved={
            "structural_tag": "tags around schemas are written as a grammar, with %json inside",
            "whitespace_pattern": WHITESPACE,
            "disable_any_whitespace": WHITESPACE,
            "disable_additional_properties": 'say "additionalProperties": false in the schema',
        },
    )

    json_: Schema | str | None = Field(None, alias="json", description="A JSON schema, or one as text.")
    regex: str | None = Field(None, min_length=1)
    choice: Choices | None = None
    grammar: str | None = Field(None, min_length=1, description="Lark in llguidance's dialect, or GBNF.")
    json_object: bool = False

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        asked = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(each is not None for each in asked) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar, json_object")
        return self


class StructuredFields(ModelFields):
    """What answers are held to; at most one of these."""

    passing: ClassVar[Passing] = BODY

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's.")
    guided_json: Schema | str | None = Field(
        None, description="vLLM's older name of structured_outputs.json."
    )
    guided_regex: str | None = Field(None, min_length=1, description="And of structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="And of structured_outputs.choice.")
    guided_grammar: str | None = Field(None, min_length=1, description="And of structured_outputs.grammar.")

    @model_validator(mode="after")
    def _at_most_one(self) -> "StructuredFields":
        asked = [name for name in StructuredFields.model_fields if self._asks(name)]
        if len(asked) > 1:
            raise refused(asked[1], f"answers are held to one grammar, and {asked[0]} gives one already")
        return self

    def _asks(self, name: str) -> bool:
        value = getattr(self, name)
        of_base = name in ModelFields.model_fields
        return not of_base and value is not None and not _is_text(value)


def _is_text(value: object) -> bool:
    return isinstance(value, ResponseFormat) and value.type == "text"


def asked_grammar(fields: StructuredFields) -> Grammar | None:
    """Return what answers are held to; None: nothing. Raises InvalidRequest for a schema that is over the limits."""
    form, outputs = fields.response_format, fields.structured_outputs
    if form is not None and form.type == "json_object":
        return Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT, param="response_format")
    if form is not None and form.json_schema is not None:
        schema = form.json_schema.schema_
        return schema_grammar(
            json.loads(ANY_OBJECT) if schema is None else schema, "response_format.json_schema.schema"
        )
    if outputs is None:
        return _of_vllm(
            fields.guided_json, fields.guided_regex, fields.guided_choice, fields.guided_grammar, "guided_"
        )
    if outputs.json_object:
        return Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT, param="structured_outputs.json_object")
    return _of_vllm(outputs.json_, outputs.regex, outputs.choice, outputs.grammar, "structured_outputs.")


def _of_vllm(
    schema: Schema | str | None, regex: str | None, choice: list[str] | None, grammar: str | None, prefix: str
) -> Grammar | None:
    if schema is not None:
        return schema_grammar(schema, f"{prefix}json")
    if regex is not None:
        return Grammar(GrammarKind.REGEX, regex, param=f"{prefix}regex")
    if choice is not None:
        param = f"{prefix}choice"
        if sum(map(len, choice)) > MAX_CHOICE:
            raise InvalidRequest(
                f"the choices have more than {MAX_CHOICE:,} characters together", param=param
            )
        return Grammar.of_choices(choice, param)
    if grammar is not None:
        return Grammar(GrammarKind.EBNF, grammar, param=f"{prefix}grammar")
    return None


def schema_grammar(schema: Schema | bool | str, param: str) -> Grammar:
    """Return the grammar of a JSON schema, given as it is or as text. Raises InvalidRequest naming ``param``."""
    try:
        if isinstance(schema, str):
            schema = from_json(schema, allow_inf_nan=False)
        check_size(schema)
    except (ValueError, GrammarRefused) as error:
        what = str(error) if isinstance(error, GrammarRefused) else f"the schema is not JSON: {error}"
        raise InvalidRequest(what, param=param) from None
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False), param=param)

"""What the output must be, from the fields that say it: OpenAI's response_format and those that vLLM adds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from common.errors import InvalidRequest
from common.messages import MOST_GRAMMAR_BYTES
from services.gateway.protocol import (
    AnyBody,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    SchemaOrText,
    StructuredOutputs,
)

ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True)
class Constraint:
    """`kind` and `text` as common.messages.Grammar has them; `field` is the body's field that asks for it."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    field: str


def constraint_of(body: AnyBody) -> Constraint | None:
    """Raises InvalidRequest. What is wrong inside of a schema or grammar is found by the worker that compiles it."""
    asked = [
        *_of_response_format(body.response_format),
        *_of_structured_outputs(body.structured_outputs),
        *_of_guided(body),
    ]
    if not asked:
        return None
    if len(asked) > 1:
        first, second = asked[0].field, asked[1].field
        raise InvalidRequest(f"{first} and {second} both say what the output must be: send one of them", second)
    (constraint,) = asked
    size = len(constraint.text.encode())
    if size > MOST_GRAMMAR_BYTES:
        raise _too_long(constraint.field, size)
    return constraint


def _too_long(field: str, size: int) -> InvalidRequest:
    return InvalidRequest(f"{field} is {size} bytes: the limit is {MOST_GRAMMAR_BYTES}", field)


def _of_response_format(form: ResponseFormat | None) -> Iterator[Constraint]:
    if isinstance(form, JsonObjectFormat):
        yield Constraint("json_schema", ANY_OBJECT, "response_format")
    elif isinstance(form, JsonSchemaFormat):
        if form.json_schema.schema is None:
            raise InvalidRequest("the schema is missing", "response_format.json_schema.schema")
        yield Constraint("json_schema", _schema(form.json_schema.schema, ""), "response_format")


def _of_structured_outputs(asked: StructuredOutputs | None) -> Iterator[Constraint]:
    if asked is None:
        return
    yield from _of_fields("structured_outputs.", asked.json, asked.regex, asked.choice, asked.grammar)
    if asked.json_object:
        yield Constraint("json_schema", ANY_OBJECT, "structured_outputs.json_object")


def _of_guided(body: AnyBody) -> Iterator[Constraint]:
    return _of_fields("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)


def _of_fields(
    prefix: str, schema: SchemaOrText | None, regex: str | None, choice: Sequence[str] | None, grammar: str | None
) -> Iterator[Constraint]:
    """Both of vLLM's spellings have the same four."""
    if schema is not None:
        yield Constraint("json_schema", _schema(schema, f"{prefix}json"), f"{prefix}json")
    if regex is not None:
        yield Constraint("regex", regex, f"{prefix}regex")
    if choice is not None:
        # A million texts would hold up every client before their regular expression is found too long.
        if (size := len(choice) - 1 + sum(map(len, choice))) > MOST_GRAMMAR_BYTES:
            raise _too_long(f"{prefix}choice", size)
        yield Constraint("regex", one_of(choice), f"{prefix}choice")
    if grammar is not None:
        yield Constraint("lark", grammar, f"{prefix}grammar")


def _schema(schema: SchemaOrText, field: str) -> str:
    """As text, with its properties in the order in which they came: it is the order of the output."""
    if not isinstance(schema, str):
        return msgspec.json.encode(schema).decode()
    try:
        msgspec.json.decode(schema, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"{field} is no JSON schema: {error}", field) from None
    return schema


def one_of(texts: Sequence[str]) -> str:
    """A regular expression of these texts and nothing else. Escaped is what has a meaning in Rust's syntax."""
    return "|".join(re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", text) for text in texts)

"""The OpenAPI 3.1 document, made from the Structs that read the requests and write the answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from common.errors import (
    BodyTimeout,
    BodyTooLarge,
    BusTimeout,
    BusUnavailable,
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    ExpertsUnavailable,
    InternalError,
    InvalidKey,
    InvalidRequest,
    ModelNotFound,
    MoeculeError,
    NoResponders,
    NotAllowed,
    NoWorker,
    Overloaded,
    RateLimited,
    Unavailable,
    WorkerLost,
)
from services.gateway.cache import Forgotten
from services.gateway.cluster import Cluster
from services.gateway.generate import MOST_MILLISECONDS
from services.gateway.keys import ADMIN_PATHS, OPEN_PATHS
from services.gateway.parameters import meaning
from services.gateway.protocol import ChatBody, CompletionBody
from services.gateway.response_events import AnyEvent, Response
from services.gateway.responses import Answer, ChatChoice, Error, TextChoice
from services.gateway.responses_api import ResponsesBody
from services.gateway.samples import SAMPLES, Sample
from services.gateway.tokenize import DetokenizeBody, Text, TokenizeBody, Tokens

VERSION = "1"
REF = "#/components/schemas/{name}"
REQUEST_ID = "the client's own x-request-id, if it is 1 to 64 letters, digits, - and _; else a random one"


# ---- answers that no other module has


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served. `max_model_len`: tokens that prompt and output share. `weights` is "random" where they
    are drawn by chance for work on speed: then the text means nothing."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["moecule"] = "moecule"
    max_model_len: int
    weights: Literal["checkpoint", "random"] = "checkpoint"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(msgspec.Struct, frozen=True):
    status: Literal["alive", "ready"]


# ---- operations


@dataclass(frozen=True)
class Operation:
    """`body`, `answer` and `events` (of a stream) name schemas; empty: there is none."""

    method: str
    path: str
    tag: str
    summary: str
    says: str = ""
    body: str = ""
    answer: str = ""
    answer_says: str = "The answer."
    media: str = "application/json"
    events: str = ""
    done: bool = True  # the stream's last event is [DONE]
    errors: tuple[type[MoeculeError], ...] = ()
    parameters: tuple[dict[str, Any], ...] = ()

    @property
    def schema(self) -> dict[str, Any]:
        if self.answer:
            return _ref(self.answer)
        return {"type": "object" if self.media == "application/json" else "string"}

    @property
    def id(self) -> str:
        return f"{self.method}{self.path.replace('/', '_').replace('{', '').replace('}', '').replace('.', '_')}"

    @property
    def every_error(self) -> tuple[type[MoeculeError], ...]:
        guarded = () if self.path in OPEN_PATHS else (InvalidKey,)
        admin = (NotAllowed,) if self.path in ADMIN_PATHS else ()
        return (*self.errors, *guarded, *admin, InternalError)

    @property
    def samples(self) -> list[Sample]:
        return [sample for sample in SAMPLES if self.method == "post" and sample.path == self.path]


READING = (InvalidRequest, BodyTimeout, BodyTooLarge)
GENERATING = (
    *READING, ContextLengthExceeded, ModelNotFound, DeadlineExceeded, Overloaded, RateLimited, NoWorker,
    ExpertsUnavailable, WorkerLost, Draining, NoResponders, BusTimeout, BusUnavailable,
)  # fmt: skip
DEADLINE = {
    "name": "x-request-deadline-ms", "in": "header", "required": False,
    "description": "Milliseconds from the request's start after which it ends with `deadline_exceeded`.",
    "schema": {"type": "integer", "minimum": 1, "maximum": MOST_MILLISECONDS},
}  # fmt: skip
SSE_SAYS = (
    "With `stream`, server-sent events: each `data:` is one object of this schema{more}. An error after the first "
    "event comes as an event, and the connection closes. "
)
OPERATIONS = (
    Operation(
        "post", "/v1/chat/completions", "Generate", "Answer a conversation",
        "OpenAI's chat completions with the parameters of vLLM. Fields that are not listed are ignored.",
        body="ChatBody", answer="ChatCompletion", events="ChatCompletionChunk", errors=GENERATING,
        parameters=(DEADLINE,),
        answer_says=SSE_SAYS.format(more="; the last one is `[DONE]`"),
    ),
    Operation(
        "post", "/v1/completions", "Generate", "Continue a text",
        "OpenAI's older completions with the parameters of vLLM: what comes after a prompt, with no chat template, and "
        "the logprobs of a given text.",
        body="CompletionBody", answer="Completion", events="Completion", errors=GENERATING, parameters=(DEADLINE,),
        answer_says=SSE_SAYS.format(more="; the last one is `[DONE]`"),
    ),
    Operation(
        "post", "/v1/responses", "Generate", "Answer by the Responses API",
        "OpenAI's Responses API, text in and text out. Nothing is kept after an answer: tools and earlier answers by "
        "their id are refused.",
        body="ResponsesBody", answer="Response", events="ResponseEvent", done=False, errors=GENERATING,
        parameters=(DEADLINE,),
        answer_says=SSE_SAYS.format(more=", and `event:` is its type") + "It ends with the event `response.completed`, "
        "`response.incomplete` or `response.failed`.",
    ),
    Operation("get", "/v1/models", "Models", "List the models", "There is one.", answer="ModelList"),
    Operation(
        "get", "/v1/models/{model}", "Models", "One model", answer="ModelCard", errors=(ModelNotFound,),
        parameters=({"name": "model", "in": "path", "required": True, "schema": {"type": "string"}},),
    ),
    Operation(
        "post", "/tokenize", "Tokens", "Tokens of a text or a chat",
        body="TokenizeBody", answer="Tokens", errors=(*READING, ContextLengthExceeded, ModelNotFound, RateLimited),
    ),
    Operation(
        "post", "/detokenize", "Tokens", "Text of tokens",
        body="DetokenizeBody", answer="Text", errors=(*READING, ModelNotFound, RateLimited),
    ),
    Operation(
        "post", "/reset_prefix_cache", "Operate", "Empty the prefix cache",
        "Every worker forgets the pages that it keeps for later prompts. Requests under way go on.",
        answer="Forgotten", errors=(Unavailable,),
    ),
    Operation("get", "/health", "Operate", "Whether the gateway is alive", answer="Status"),
    Operation(
        "get", "/ready", "Operate", "Whether a worker can serve", "The error says why not.",
        answer="Status", errors=(NoWorker, Draining),
    ),
    Operation("get", "/metrics", "Operate", "Every actor's metrics, for Prometheus", media="text/plain"),
    Operation("get", "/openapi.json", "Operate", "This document"),
    Operation("get", "/asyncapi.json", "Operate", "The same of the NATS door, as an AsyncAPI document"),
    Operation("get", "/docs", "Operate", "This document as a page to read", media="text/html"),
    Operation(
        "get", "/cluster", "Operate", "The actors and what each does",
        "From the heartbeats that this gateway hears: to ask costs the actors nothing. All who ask within 0.2 s get "
        "the same answer.",
        answer="Cluster",
    ),
    Operation("get", "/", "Operate", "The cluster as a live page, and a chat", media="text/html"),
)  # fmt: skip


# ---- the document


@dataclass(frozen=True)
class Served:
    """What the document says of this server: its address, its model, how many token ids that has, whether it asks for
    a key."""

    base_url: str
    model: str
    vocab: int
    keys: bool = False


def document(served: Served) -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, served)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Moecule",
            "version": VERSION,
            "description": f"The OpenAI API of a server that has the model `{served.model}`."
            + (" It asks for a key: `Authorization: Bearer KEY`." if served.keys else ""),
        },
        "servers": [{"url": served.base_url}],
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in OPERATIONS)],
        "paths": paths,
        "components": {"schemas": _schemas(served), "headers": _HEADERS} | (_SCHEMES if served.keys else {}),
    }


_SCHEMES = {
    "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key of this server."}}
}


_HEADERS = {
    "x-request-id": {"description": f"The request's name in the logs: {REQUEST_ID}.", "schema": {"type": "string"}},
    "retry-after": {
        "description": "Seconds after which to ask again.",
        "schema": {"type": "string", "pattern": "^\\d+$"},
    },
    "www-authenticate": {"description": "How to send a key.", "schema": {"const": "Bearer"}},
    "x-should-retry": {
        "description": "`false` where asking again is useless (the openai SDK heeds it).",
        "schema": {"const": "false"},
    },
}


def _operation(operation: Operation, served: Served) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": _responses(operation),
    }
    if operation.says:
        found["description"] = operation.says
    if operation.parameters:
        found["parameters"] = list(operation.parameters)
    if served.keys and operation.path not in OPEN_PATHS:
        found["security"] = [{"key": []}]
    if operation.body:
        examples = {s.name: {"summary": s.title, "value": s.request(served.model)} for s in operation.samples}
        media = {"schema": _ref(operation.body), "examples": examples}
        found["requestBody"] = {"required": True, "content": {"application/json": media}}
    if operation.samples:
        found["x-codeSamples"] = [code for sample in operation.samples for code in _codes(sample, served)]
    return found


def _codes(sample: Sample, served: Served) -> list[dict[str, str]]:
    sources = {"Shell": sample.shell(served.base_url, served.model, key=served.keys)}
    if sample.call:
        sources["Python"] = sample.python(served.base_url, served.model, key=served.keys)
    return [
        {"lang": lang, "label": sample.title, "x-says": sample.says, "source": source}
        for lang, source in sources.items()
    ]


def _responses(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {operation.media: {"schema": operation.schema}}
    if operation.events:
        content["text/event-stream"] = {"schema": _event_schema(operation.events, done=operation.done)}
    tagged = {"x-request-id": {"$ref": "#/components/headers/x-request-id"}}
    found = {"200": {"description": operation.answer_says, "headers": tagged, "content": content}}
    by_status: dict[int, list[type[MoeculeError]]] = {}
    for error in operation.every_error:
        by_status.setdefault(error.status, []).append(error)
    for status, kinds in sorted(by_status.items()):
        words = {"x-should-retry" if kind.retry_after is None else "retry-after" for kind in kinds}
        words |= {"www-authenticate"} if InvalidKey in kinds else set()
        found[str(status)] = {
            "description": f"Code {' or '.join(f'`{error.code}`' for error in kinds)}.",
            "headers": tagged | {word: {"$ref": f"#/components/headers/{word}"} for word in sorted(words)},
            "content": {"application/json": {"schema": _ref("Error")}},
        }
    return found


def _event_schema(name: str, *, done: bool) -> dict[str, Any]:
    """Of one server-sent event, as the next OpenAPI and tools of today describe them: its fields, `data` being JSON."""
    data: dict[str, Any] = {
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(name), _ref("Error")]},
    }
    if done:
        data = {"anyOf": [{"const": "[DONE]"}, data]}
    properties = {"event": {"type": "string"}, "data": {"type": "string"} | data}
    return {"type": "object", "properties": properties, "required": ["data"]}


# ---- schemas


BODIES = (ChatBody, CompletionBody, ResponsesBody, TokenizeBody, DetokenizeBody)
_ANSWERS = (Answer, ChatChoice, TextChoice, Response, ModelList, Tokens, Text, Forgotten, Status, Cluster, Error)


def _schemas(served: Served) -> dict[str, Any]:
    (*_, events), schemas = msgspec.json.schema_components([*BODIES, *_ANSWERS, AnyEvent], ref_template=REF)
    schemas["ResponseEvent"] = events
    answer = schemas.pop("Answer")
    schemas["ChatCompletion"] = _answer(answer, ChatChoice)
    schemas["ChatCompletionChunk"] = _answer(answer, ChatChoice)
    schemas["Completion"] = _answer(answer, TextChoice)
    for schema in schemas.values():
        without_vain_defaults(schema)
    for kind in BODIES:
        explain(schemas[kind.__name__], kind.__name__, served)
    return dict(sorted(schemas.items()))


def explain(schema: dict[str, Any], kind: str, served: Served) -> None:
    """Say of each field of a body what it means, and what this server takes."""
    for name, field in schema["properties"].items():
        if text := meaning(kind, name):
            field["description"] = text
        _narrow(name, field, served)


def without_vain_defaults(schema: dict[str, Any]) -> None:
    """Null means that a field is left out: what holds then is said in words. An empty list says nothing either."""
    for field in schema.get("properties", {}).values():
        if field.get("default", ...) in (None, ()):
            del field["default"]


def _narrow(name: str, schema: dict[str, Any], served: Served) -> None:
    """What this server's model leaves of a field: one name, the ids of its vocabulary."""
    for inner in _nested(schema):
        if name == "model" and inner.get("type") == "string":
            inner["enum"] = [served.model]
        if name in ("prompt", "tokens", "stop_token_ids") and inner.get("type") == "integer":
            inner |= {"minimum": 0, "maximum": served.vocab - 1}


def _nested(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for part in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())):
        yield from _nested(part)


def _answer(answer: dict[str, Any], choice: type[Any]) -> dict[str, Any]:
    """`Answer` is written by both endpoints, with choices of their own."""
    choices = {"type": "array", "items": _ref(choice.__name__)}
    return {**answer, "properties": {**answer["properties"], "choices": choices}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": REF.format(name=name)}

"""The AsyncAPI 3.0 document of the NATS door, made from the Structs that read its requests and write its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from common.errors import (
    BusTimeout,
    ExpertsUnavailable,
    InternalError,
    InvalidKey,
    MoeculeError,
    NoResponders,
    NotFound,
    RequestCancelled,
)
from common.settings import without_login
from services.gateway.door_messages import (
    ANSWERS,
    CANCEL,
    CODE_HEADER,
    ERROR_HEADER,
    GENERATE,
    KINDS,
    MODELS,
    QUEUE,
    Cancelled,
    MessagesRequest,
    TextRequest,
    TokensRequest,
)
from services.gateway.openapi import GENERATING, REF, VERSION, ModelList, Served, explain, without_vain_defaults
from services.gateway.protocol import ChatBody, CompletionBody
from services.gateway.responses import ChatLogprobs, TextLogprobs

QUESTION = [{"role": "user", "content": "What is 47 + 85?"}]
EXAMPLES: dict[str, dict[str, Any]] = {
    "TextRequest": {"prompt": "Once upon a time", "max_tokens": 50},
    "TokensRequest": {"tokens": [0, 3, 331, 273], "max_tokens": 50},
    "MessagesRequest": {"messages": QUESTION, "temperature": 0},
}
ABOUT = f"""The NATS door of a server that has the model `{{model}}`.

**Ask.** Publish a request to `{GENERATE}`, with a subject as its reply subject that you are subscribed to: your inbox.
Take a subscription of the request's own: what a NATS client calls a request waits for one answer, and there are many.
Every message is a request of its own, and is carried out once. One without a reply subject, or whose reply subject has
wildcards or begins with `moecule.` or `$`, is ignored, since nobody could be answered.{{key}}

**Answers.** They are JSON objects on your inbox, told apart by `type`: `accepted`, then `tokens` as the output comes,
then `end`; or `error`, which may also come first. `end` and `error` are the last. `seq` counts the answers to a request
from 0; after a gap (you read too slowly, or NATS was restarted) an answer is lost, and asking anew is what is left.
When there is nothing to tell for a second an `alive` comes: if nothing at all comes for longer, the gateway is gone.

**Cancel.** Send anything to the subject that `accepted` names (it is the reply subject of every answer, too), or just
unsubscribe from your inbox: a caller that is gone is noticed at the next answer, and its request is ended.

**Nobody there.** With no gateway, the NATS server itself sends an empty message with the header `Status: 503` to your
inbox; NATS clients call that "no responders".

**Errors** have the code that HTTP's have, in the answer and in the header `{CODE_HEADER}`; `{ERROR_HEADER}` says it in
words. Codes: {{codes}}.
"""
KEY = """ This server asks for an API key: send the header `Authorization: Bearer KEY` with requests and with the
question for the models. A cancellation needs none, since nobody else knows the request's id."""
USER = """A user of yours and its password, from whoever runs the server (docs/nats-users.conf calls it `service`). Such
a user hears only inboxes that begin with its own name: connect with the inbox prefix `_INBOX.<user>`."""
CODES: tuple[type[MoeculeError], ...] = tuple(
    dict.fromkeys(
        (
            InvalidKey,
            *GENERATING,
            ExpertsUnavailable,
            NoResponders,
            BusTimeout,
            RequestCancelled,
            NotFound,
            InternalError,
        )
    )
)


@dataclass(frozen=True)
class Broker:
    """What the document says of this server: the NATS server's URL, the model, how many token ids that has."""

    nats_url: str
    model: str
    vocab: int
    keys_wanted: bool = False
    users: bool = False  # it asks who connects
    tls: bool = False


def asyncapi_page(broker: Broker) -> bytes:
    return msgspec.json.encode(asyncapi_document(broker))


def asyncapi_document(broker: Broker) -> dict[str, Any]:
    codes = ", ".join(f"`{error.code}` ({error.status})" for error in CODES)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Moecule over NATS",
            "version": VERSION,
            "description": ABOUT.format(model=broker.model, codes=codes, key=KEY if broker.keys_wanted else ""),
        },
        "defaultContentType": "application/json",
        "servers": {"nats": _server(broker)},
        "channels": _CHANNELS,
        "operations": _OPERATIONS,
        "components": {"messages": _messages(broker), "schemas": _schemas(broker)},
    }


def _server(broker: Broker) -> dict[str, Any]:
    url = without_login(broker.nats_url)
    server: dict[str, Any] = {"host": urlsplit(url).netloc or url, "protocol": "nats"}
    if broker.tls:
        server["description"] = "It speaks TLS: connect to `tls://`, with the certificate of its authority."
    if broker.users:
        server["security"] = [{"type": "userPassword", "description": USER}]
    return server


# ---- channels and operations


def _channel(address: str | None, says: str, messages: list[str], **more: Any) -> dict[str, Any]:
    named = {name: {"$ref": f"#/components/messages/{name}"} for name in messages}
    return {"address": address, "description": says, "messages": named, **more}


def _operation(channel: str, summary: str, answers: str, queue: str = "") -> dict[str, Any]:
    """What the gateway does: it receives a message, and replies on the subject that this names."""
    bindings = {"bindings": {"nats": {"queue": queue, "bindingVersion": "0.1.0"}}} if queue else {}
    return {
        "action": "receive",
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary,
        "reply": {
            "address": {"location": "$message.header#/reply", "description": "The message's NATS reply subject."},
            "channel": {"$ref": f"#/channels/{answers}"},
        },
        **bindings,
    }


_ANSWER_NAMES = [kind.__name__ for kind in ANSWERS]
_CHANNELS = {
    "generate": _channel(GENERATE, "Requests.", [kind.__name__ for kind in KINDS.values()]),
    "answers": _channel(None, "The inbox of the one who asks: the reply subject of the request.", _ANSWER_NAMES),
    "cancel": _channel(
        f"{CANCEL}.{{request_id}}",
        "Whatever is sent here ends the request. A reply subject is not needed.",
        ["Anything"],
        parameters={"request_id": {"description": "As `accepted` has it."}},
    ),
    "cancelled": _channel(None, "The reply subject of the cancellation.", ["Cancelled", "Refused"]),
    "models": _channel(MODELS, "The question which models there are; it may be empty.", ["Anything"]),
    "modelList": _channel(None, "The reply subject of the question.", ["ModelList", "Refused"]),
}
_OPERATIONS = {
    "generate": _operation("generate", "Answer a request.", "answers", QUEUE),
    "cancel": _operation("cancel", "End a request.", "cancelled"),
    "models": _operation("models", "List the models. There is one.", "modelList", QUEUE),
}


# ---- messages and schemas

_ERROR_HEADERS = {
    "type": "object",
    "properties": {ERROR_HEADER: {"type": "string"}, CODE_HEADER: {"type": "string"}},
    "required": [ERROR_HEADER, CODE_HEADER],
}
_REQUEST_HEADERS = {
    "type": "object",
    "properties": {
        "traceparent": {
            "type": "string",
            "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$",
            "description": "The caller's span, as W3C writes it: where the server makes traces, the request belongs to "
            "that span's. A malformed one is ignored.",
        },
        "tracestate": {"type": "string", "description": "W3C's, which belongs to it."},
    },
}
_KINDS = (*KINDS.values(), *ANSWERS, Cancelled, ModelList)
_BATCHES = "Answers come in batches as the output comes, and the last has the usage: "
MEANINGS = {
    "prompt": "A text.",
    "tokens": "A text as token ids.",
    "stream": _BATCHES + "only true is taken.",
    "stream_options": _BATCHES + "leave it out.",
}


def _messages(broker: Broker) -> dict[str, Any]:
    messages: dict[str, Any] = {kind.__name__: _message(kind.__name__, broker) for kind in _KINDS}
    for kind in KINDS.values():
        messages[kind.__name__]["headers"] = _REQUEST_HEADERS
    messages["Refused"]["headers"] = _ERROR_HEADERS
    messages["Anything"] = {"name": "Anything", "payload": {}}
    return messages


def _message(name: str, broker: Broker) -> dict[str, Any]:
    message: dict[str, Any] = {"name": name, "payload": {"$ref": REF.format(name=name)}}
    if name in EXAMPLES:
        message["examples"] = [{"payload": {"model": broker.model, **EXAMPLES[name]}}]
    return message


def _schemas(broker: Broker) -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components([*_KINDS, TextLogprobs, ChatLogprobs], ref_template=REF)
    served = Served("", broker.model, broker.vocab)
    for schema in schemas.values():
        without_vain_defaults(schema)
    for kind, base in ((TextRequest, CompletionBody), (TokensRequest, CompletionBody), (MessagesRequest, ChatBody)):
        schema = schemas[kind.__name__]
        explain(schema, base.__name__, served)
        for name in schema["properties"].keys() & MEANINGS.keys():
            schema["properties"][name]["description"] = MEANINGS[name]
    schemas["Batch"]["properties"]["logprobs"] = {
        "anyOf": [{"$ref": REF.format(name=kind.__name__)} for kind in (TextLogprobs, ChatLogprobs)],
        "description": "If the request asked for them: the first form for `prompt` and `tokens`, the second for "
        "`messages`.",
    }
    _drop_discriminators(schemas)
    return dict(sorted(schemas.items()))


def _drop_discriminators(node: Any) -> None:
    """OpenAPI's are objects, AsyncAPI's are texts; without one a schema says the same."""
    if isinstance(node, dict):
        node.pop("discriminator", None)
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _drop_discriminators(inner)

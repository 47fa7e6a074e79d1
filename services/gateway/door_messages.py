"""What passes the NATS door, as JSON: requests with the fields of HTTP's bodies, and the numbered answers.

| subject                          | message -> answers                                      |
|----------------------------------|---------------------------------------------------------|
| moecule.v1.generate              | a request -> Accepted, Batch..., and Ended or Refused   |
| moecule.v1.cancel.<request id>   | anything -> Cancelled, or Refused                       |
| moecule.v1.models                | anything -> ModelList                                   |
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from common.errors import InvalidRequest, MoeculeError
from common.messages import SCHEMA, subject_of_kind
from services.gateway.bodies import decode_body
from services.gateway.protocol import AnyBody, ChatBody, CompletionBody, Refusals, TokenId, refused_fields
from services.gateway.responses import ErrorDetails, PromptScores, Usage
from services.gateway.tool_parser import ToolCallDelta

GENERATE = subject_of_kind("generate")
MODELS = subject_of_kind("models")
CANCEL = subject_of_kind("cancel")
QUEUE = "moecule-gateways"
ERROR_HEADER, CODE_HEADER = "Nats-Service-Error", "Nats-Service-Error-Code"
MOST_INBOX_CHARACTERS = 256
_INBOX = re.compile(r"[^\s.*>$\x00-\x20\x7f][^\s.*>\x00-\x20\x7f]*(\.[^\s.*>\x00-\x20\x7f]+)*")


# ---- requests


class TextRequest(CompletionBody, frozen=True, kw_only=True):
    """Continue a text."""

    prompt: str


class TokensRequest(CompletionBody, frozen=True, kw_only=True):
    """Continue a text that is given as token ids."""

    prompt: list[TokenId] = msgspec.field(name="tokens")  # type: ignore[assignment]  # one form of it; nobody writes


class MessagesRequest(ChatBody, frozen=True, kw_only=True):
    """Answer a conversation."""


class _Which(msgspec.Struct, frozen=True):
    prompt: Raw | UnsetType = UNSET
    tokens: Raw | UnsetType = UNSET
    messages: Raw | UnsetType = UNSET


KINDS: dict[str, type[TextRequest] | type[TokensRequest] | type[MessagesRequest]] = {
    "prompt": TextRequest,
    "tokens": TokensRequest,
    "messages": MessagesRequest,
}
REFUSED: Refusals = {
    "stream": ((True,), "answers over NATS always come in batches: leave it out"),
    "stream_options": ((), "the last answer over NATS always has the usage: leave it out"),
}


def read_request(data: bytes) -> tuple[AnyBody, list[str]]:
    """The body, and the names of unknown fields. Raises InvalidRequest."""
    which, _ = decode_body(data, _Which)
    found = [name for name in KINDS if bytes(getattr(which, name) or b"null") != b"null"]
    if len(found) != 1:
        raise InvalidRequest(f"send exactly one of {', '.join(KINDS)}", found[-1] if found else "prompt")
    body, unknown = decode_body(data, KINDS[found[0]])
    for name, sentence in refused_fields(body, REFUSED):
        raise InvalidRequest(f"{name}: {sentence}", name)
    return body, [name for name in unknown if name not in KINDS]


@contextlib.contextmanager
def blaming_field(body: AnyBody) -> Iterator[None]:
    """A prompt of token ids has a name of its own here."""
    try:
        yield
    except InvalidRequest as error:
        if isinstance(body, TokensRequest) and error.param == "prompt":
            error.param = "tokens"
        raise


def is_inbox(subject: str) -> bool:
    """Whether answers may be sent there. A request names any subject, and they would go out with the gateway's rights:
    none to the actors, to the server's own subjects ($JS, $SYS), or to a pattern."""
    if len(subject) > MOST_INBOX_CHARACTERS or not _INBOX.fullmatch(subject):
        return False
    return subject.split(".")[0] != SCHEMA.split(".")[0]


# ---- answers


class DoorAnswer(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """`seq` counts all answers to one request from 0: a gap means that one was lost on its way."""

    request_id: str
    seq: int


class Accepted(DoorAnswer, frozen=True, kw_only=True, tag="accepted"):
    """The first answer to a request that is well-formed. Whatever is sent to the subject `cancel` ends it."""

    cancel: str


class Batch(DoorAnswer, frozen=True, kw_only=True, tag="tokens"):
    """New tokens of one choice, `index` being the place of the first in its output.

    `text` and `reasoning` are what they add to the answer and to what is thought before it; text that may be the start
    of a stop string comes later than its tokens. `finish_reason` is set in the last batch of a choice.
    """

    choice: int
    index: int
    tokens: list[int]
    text: str
    reasoning: str
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET
    logprobs: Any = UNSET  # TextLogprobs or ChatLogprobs
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    prompt_logprobs: PromptScores | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class Alive(DoorAnswer, frozen=True, kw_only=True, tag="alive"):
    """The request is still worked on, and had nothing to tell for a second."""


class Ended(DoorAnswer, frozen=True, kw_only=True, tag="end"):
    """The last answer. `finish_reasons`: stop, length or tool_calls, one a choice."""

    finish_reasons: list[str]
    usage: Usage


class DoorError(ErrorDetails, frozen=True, kw_only=True):
    """`param` names the field that is wrong, `code` the kind of error. `status` is what HTTP would say; ask again after
    `retry_after` seconds, or not at all where it is null."""

    status: int
    retry_after: int | None

    @classmethod
    def of(cls, error: MoeculeError) -> DoorError:
        return cls(
            message=error.message,
            type=error.type,
            param=error.param,
            code=error.code,
            status=error.status,
            retry_after=error.retry_after,
        )


class Refused(DoorAnswer, frozen=True, kw_only=True, tag="error"):
    """The last answer, to a request that was refused or has failed. The headers Nats-Service-Error and
    Nats-Service-Error-Code say it too."""

    error: DoorError


class Cancelled(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="cancelled"):
    """The request's own inbox gets an error with the code request_cancelled."""

    request_id: str


ANSWERS = (Accepted, Batch, Alive, Ended, Refused)


def error_headers(error: MoeculeError) -> dict[str, str]:
    return {ERROR_HEADER: " ".join(error.message.split())[:256], CODE_HEADER: error.code}

"""POST /v1/responses: OpenAI's Responses API, text in and text out, on the path that a chat takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.types import Receive, Scope, Send

from common.errors import InvalidRequest
from services.gateway.generate import Endpoint, EventStream, Generator, send_json
from services.gateway.limits import Permit
from services.gateway.output import Delta, Output
from services.gateway.prepare import Job
from services.gateway.protocol import (
    ChatBody,
    ChatMessage,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    Priority,
    Refusals,
    ResponseFormat,
    Role,
    TextFormat,
    Timeout,
    check,
    joined,
    refused_fields,
)
from services.gateway.response_events import Response, Story, encoded
from services.gateway.responses import Usage

# ---- the body


class InputPart(msgspec.Struct, frozen=True):
    type: Literal["input_text", "output_text", "reasoning_text"]
    text: str


class InputItem(msgspec.Struct, frozen=True):
    """A message, or the reasoning of an earlier answer, which may be sent back with it and is not shown to the model:
    the chat templates of models that reason leave it out too."""

    type: Literal["message", "reasoning"] = "message"
    role: Role | None = None
    content: str | list[InputPart] | None = None

    @property
    def text(self) -> str:
        return joined(self.content)


class SchemaFormat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    """The schema is enforced whether `strict` is true or not."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True):
    format: TextFormat | JsonObjectFormat | SchemaFormat | None = None


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True):
    """A request of the Responses API. Nothing is kept after an answer, so each request carries its conversation."""

    model: str
    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    user: str | None = None
    cache_salt: str | None = None
    priority: Priority | None = None
    timeout: Timeout | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    # Known, and refused where they ask for something: see REFUSED.
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    store: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    truncation: str | None = None
    top_logprobs: int | None = None


_NO_STATE = "this server keeps no conversations: send all of it in input"
_NO_TOOLS = "tools are called through /v1/chat/completions only"
REFUSED: Refusals = {
    "previous_response_id": ((), _NO_STATE),
    "conversation": ((), _NO_STATE),
    "prompt": ((), "this server keeps no prompt templates: send the text in instructions and input"),
    "background": ((False,), "this server makes no answers in the background: leave background out"),
    "store": ((False,), "this server stores no answers: leave store out, or send false"),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "truncation": (("disabled",), "this server shortens no input: leave truncation out"),
    "top_logprobs": ((0,), "logprobs are given by /v1/chat/completions only"),
}

# Agents ask for it by habit. Reasoning is always given, in clear text.
INCLUDABLE = ("reasoning.encrypted_content",)


def check_supported(body: ResponsesBody) -> None:
    """Raises InvalidRequest for what is known and not here."""
    for name, sentence in refused_fields(body, REFUSED):
        raise InvalidRequest(sentence, name)
    for i, name in enumerate(body.include or ()):
        if name not in INCLUDABLE:
            raise InvalidRequest(f"{name!r} cannot be included", f"include[{i}]")


# ---- as a chat


class AsChat(ChatBody, frozen=True, kw_only=True):
    """The chat that a request of this API means; what is said of its limit uses this API's name."""

    @property
    def output_limit(self) -> tuple[int | None, str]:
        return self.max_tokens, "max_output_tokens"


def as_chat(body: ResponsesBody) -> AsChat:
    """Raises InvalidRequest."""
    return AsChat(
        model=body.model,
        messages=[*_instructions(body), *_messages(body)],
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stream=body.stream,
        user=body.user,
        cache_salt=body.cache_salt,
        response_format=_response_format(body.text),
    )


def _instructions(body: ResponsesBody) -> list[ChatMessage]:
    return [ChatMessage("system", body.instructions)] if body.instructions else []


def _messages(body: ResponsesBody) -> list[ChatMessage]:
    if isinstance(body.input, str):
        return [ChatMessage("user", body.input)]
    messages = [_message(i, item) for i, item in enumerate(body.input) if item.type == "message"]
    if not messages:
        raise InvalidRequest("there is no message in input", "input")
    return messages


def _message(index: int, item: InputItem) -> ChatMessage:
    if item.role is None or item.content is None:
        missing = "role" if item.role is None else "content"
        raise InvalidRequest(f"the message has no {missing}", f"input[{index}].{missing}")
    return ChatMessage(item.role, item.text)


def _response_format(text: TextOptions | None) -> ResponseFormat | None:
    """The chat's field keeps the schema one level deeper."""
    format = text.format if text else None
    if isinstance(format, SchemaFormat):
        return JsonSchemaFormat(JsonSchema(**msgspec.structs.asdict(format)))
    return format


@contextlib.contextmanager
def named_as_here() -> Iterator[None]:
    """Errors that name a field of the chat name the one that it came from."""
    try:
        yield
    except InvalidRequest as error:
        for chat, here in (("messages", "input"), ("response_format", "text.format")):
            if error.param and error.param.startswith(chat):
                error.param = here
        raise


# ---- the endpoint


class ResponsesEndpoint(Endpoint[ChatBody]):
    def __init__(self, generator: Generator) -> None:
        super().__init__(generator, ChatBody)

    async def answer(self, permit: Permit, scope: Scope, receive: Receive, send: Send) -> None:
        preparer = self._generator.preparer
        body = await self._generator.read_body(scope, receive, ResponsesBody)
        check_supported(body)
        with named_as_here():
            chat = as_chat(body)
            check(chat)
            (job,) = permit.take(await preparer.chat(chat), body.priority, body.timeout)
            output = Output(job, preparer.pieces(chat), split_reasoning=preparer.tokenizer.reasons)
            request_id = scope["moecule.request_id"]
            story = Story(_response(body, job, request_id), request_id)
            answer = self._streamed if body.stream else self._at_once
            await answer(story, job, output, receive, send)

    async def _at_once(self, story: Story, job: Job, output: Output, receive: Receive, send: Send) -> None:
        reason = "stop"

        async def take(_: int, delta: Delta) -> None:
            nonlocal reason
            story.add(delta)
            reason = delta.finish or reason

        await self._generator.run([job], [output], receive, take)
        story.finish(reason, Usage.of(len(job.prompt), [output]))
        await send_json(send, msgspec.json.encode(story.response))

    async def _streamed(self, story: Story, job: Job, output: Output, receive: Receive, send: Send) -> None:
        events, reason = EventStream(send), "stop"

        async def take(_: int, delta: Delta) -> None:
            nonlocal reason
            told = [] if events.begun else story.start()
            reason = delta.finish or reason
            await events.send(encoded([*told, *story.add(delta)]))

        if error := await self._generator.run_told([job], [output], receive, take, events):
            await events.end(encoded(story.fail(error)))
        else:
            await events.end(encoded(story.finish(reason, Usage.of(len(job.prompt), [output]))))


def _response(body: ResponsesBody, job: Job, request_id: str) -> Response:
    """The response before its first word."""
    return Response(
        id=f"resp_{request_id}",
        created_at=int(time.time()),
        model=body.model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        temperature=job.sampling.temperature,
        top_p=job.sampling.top_p,
        text={"format": (body.text and body.text.format) or TextFormat()},
        metadata=body.metadata or {},
        user=body.user,
    )

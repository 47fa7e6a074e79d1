"""The answers of /v1/responses: the response object, its items, and the events that tell of them as they come."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import msgspec
from msgspec.structs import replace

from common.errors import MoeculeError
from services.gateway.output import Delta
from services.gateway.responses import Usage

ItemStatus = Literal["in_progress", "completed", "incomplete"]
_encode = msgspec.json.Encoder().encode


# ---- the response object


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    text: str


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    text: str
    annotations: tuple[Any, ...] = ()
    logprobs: tuple[Any, ...] = ()


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought before it answered, in full: there is no summary."""

    id: str
    status: ItemStatus
    content: tuple[ReasoningText, ...] = ()
    summary: tuple[Any, ...] = ()


class MessageItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: tuple[OutputText, ...] = ()


Item = ReasoningItem | MessageItem


class InputDetails(msgspec.Struct, frozen=True):
    """`cache_write_tokens` counts what is billed as kept, which is nothing here."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> ResponseUsage:
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(usage.completion_tokens_details.reasoning_tokens),
            total_tokens=usage.total_tokens,
        )


class Incomplete(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Failure(msgspec.Struct, frozen=True):
    """Why a response failed under way. OpenAI has one code for all that is no fault of the request; `type` names it."""

    message: str
    type: str
    code: Literal["server_error"] = "server_error"


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, or what there is of it. The fields of the request are given back as they were applied."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    model: str
    output: tuple[Item, ...] = ()
    usage: ResponseUsage | None = None
    error: Failure | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float
    top_p: float
    text: dict[str, Any]
    metadata: dict[str, str]
    user: str | None = None
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    tool_choice: Literal["none"] = "none"
    tools: tuple[Any, ...] = ()
    truncation: Literal["disabled"] = "disabled"


# ---- events


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """`sequence_number` counts the events of a response from 0 on."""

    sequence_number: int


class Created(Event, frozen=True, tag="response.created"):
    response: Response


class InProgress(Event, frozen=True, tag="response.in_progress"):
    response: Response


class Completed(Event, frozen=True, tag="response.completed"):
    response: Response


class Cut(Event, frozen=True, tag="response.incomplete"):
    response: Response


class Failed(Event, frozen=True, tag="response.failed"):
    response: Response


class ItemAdded(Event, frozen=True, tag="response.output_item.added"):
    output_index: int
    item: Item


class ItemDone(Event, frozen=True, tag="response.output_item.done"):
    output_index: int
    item: Item


class PartEvent(Event, frozen=True, kw_only=True):
    """Of one part of an item. Items here have one part."""

    item_id: str
    output_index: int
    content_index: int = 0


class PartAdded(PartEvent, frozen=True, tag="response.content_part.added"):
    part: ReasoningText | OutputText


class PartDone(PartEvent, frozen=True, tag="response.content_part.done"):
    part: ReasoningText | OutputText


class ReasoningDelta(PartEvent, frozen=True, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningDone(PartEvent, frozen=True, tag="response.reasoning_text.done"):
    text: str


class TextDelta(PartEvent, frozen=True, tag="response.output_text.delta"):
    delta: str
    logprobs: tuple[Any, ...] = ()


class TextDone(PartEvent, frozen=True, tag="response.output_text.done"):
    text: str
    logprobs: tuple[Any, ...] = ()


AnyEvent = (
    Created | InProgress | ItemAdded | PartAdded | ReasoningDelta | ReasoningDone | TextDelta | TextDone | PartDone
    | ItemDone | Completed | Cut | Failed
)  # fmt: skip


def encoded(events: Iterable[Event]) -> bytes:
    """As server-sent events."""
    parts = (f"event: {event.__struct_config__.tag}\ndata: ".encode() + _encode(event) for event in events)
    return b"".join(part + b"\n\n" for part in parts)


# ---- from deltas to items and events


class OpenItem:
    """An item under way: `item` and `part` are what it becomes, `delta` and `done` the events of its text."""

    id_prefix: ClassVar[str]
    item: ClassVar[Any]
    part: ClassVar[Any]
    delta: ClassVar[Any]
    done: ClassVar[Any]

    def __init__(self, index: int, request_id: str) -> None:
        self.id = f"{self.id_prefix}_{request_id}"
        self.index = index
        self.texts: list[str] = []

    def as_item(self, status: ItemStatus) -> Item:
        content = () if status == "in_progress" else (self.part(self.text),)
        return self.item(id=self.id, status=status, content=content)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}


class OpenReasoning(OpenItem):
    id_prefix, item, part, delta, done = "rs", ReasoningItem, ReasoningText, ReasoningDelta, ReasoningDone


class OpenMessage(OpenItem):
    id_prefix, item, part, delta, done = "msg", MessageItem, OutputText, TextDelta, TextDone


class Story:
    """One response as its text comes. Each method returns the events of what it changed.

    `start` once, `add` for each delta, then `finish` or `fail`; `response` is then the whole answer.
    """

    def __init__(self, response: Response, request_id: str) -> None:
        self.response = response
        self._request_id = request_id
        self._items: list[Item] = []
        self._open: OpenItem | None = None
        self._numbers = 0

    def start(self) -> list[Event]:
        return [self._event(Created, response=self.response), self._event(InProgress, response=self.response)]

    def add(self, delta: Delta) -> list[Event]:
        events: list[Event] = []
        if delta.reasoning:
            events += self._grow(OpenReasoning, delta.reasoning)
        if delta.text:
            events += self._grow(OpenMessage, delta.text)
        return events

    def finish(self, reason: str, usage: Usage) -> list[Event]:
        """`reason`: stop, or length where the output was cut."""
        cut = reason == "length"
        events: list[Event] = []
        if not cut and not isinstance(self._open, OpenMessage):
            events += self._begin(OpenMessage)  # an answer without a word is a message all the same
        events += self._close("incomplete" if cut else "completed")
        self._end(
            status="incomplete" if cut else "completed",
            incomplete_details=Incomplete() if cut else None,
            usage=ResponseUsage.of(usage),
        )
        return [*events, self._event(Cut if cut else Completed, response=self.response)]

    def fail(self, error: MoeculeError) -> list[Event]:
        events = list(self._close("incomplete"))
        self._end(status="failed", error=Failure(error.message, error.code))
        return [*events, self._event(Failed, response=self.response)]

    def _end(self, **fields: Any) -> None:
        self.response = replace(self.response, output=tuple(self._items), completed_at=int(time.time()), **fields)

    def _grow(self, kind: type[OpenItem], text: str) -> Iterator[Event]:
        if not isinstance(self._open, kind):
            yield from self._begin(kind)
        assert self._open is not None
        self._open.texts.append(text)
        yield self._event(kind.delta, delta=text, **self._open.place)

    def _begin(self, kind: type[OpenItem]) -> Iterator[Event]:
        yield from self._close("completed")
        self._open = kind(len(self._items), self._request_id)
        yield self._event(ItemAdded, output_index=self._open.index, item=self._open.as_item("in_progress"))
        yield self._event(PartAdded, part=kind.part(""), **self._open.place)

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        ended, self._open = self._open, None
        if ended is None:
            return
        item = ended.as_item(status)
        self._items.append(item)
        yield self._event(ended.done, text=ended.text, **ended.place)
        yield self._event(PartDone, part=item.content[0], **ended.place)
        yield self._event(ItemDone, output_index=ended.index, item=item)

    def _event(self, kind: Any, **fields: Any) -> Event:
        number, self._numbers = self._numbers, self._numbers + 1
        return kind(sequence_number=number, **fields)

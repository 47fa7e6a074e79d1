"""What the model writes, read as text and calls while it comes, and as a client is sent it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from services.gateway.protocol import CalledFunction, ToolCall
from services.gateway.stops import held_back
from services.gateway.tools import Syntax

MOST_SPACE = 16  # characters of white space that a call may have between its parts

# ---- what the model writes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    index: int


Event = Text | CallBegin | Arguments | CallEnd


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class _Malformed(Exception):
    """The text is not what a call has here."""


class ToolParser:
    """The model's text in pieces -> events; joined, they are the same however the text is cut.

    A call begins once its head is whole, names a tool of the request and is followed by a JSON object: what looks
    like a call and is none stays text. The object's own brackets end it, so a marker inside a string is data. A call
    that is cut short, or whose arguments are broken further on, has been told already: it ends where it breaks.
    """

    def __init__(self, syntax: Syntax, names: Collection[str], new_id: Callable[[], str] = new_call_id) -> None:
        self._syntax = syntax
        self._names = names
        self._new_id = new_id
        self._openers = tuple(filter(None, (syntax.begin, syntax.call)))
        self._held = ""
        self._step: Callable[[], list[Event] | None] = self._text
        self._count = 0  # calls begun

    def push(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        while self._held and (found := self._step()) is not None:
            events += found
        return _merged(events)

    def flush(self) -> list[Event]:
        """What was held back, when no more comes."""
        held, self._held = self._held, ""
        if self._step == self._arguments:
            return [CallEnd(self._count - 1)]
        if self._step in (self._tail, self._between) or not held:
            return []  # white space, or the beginning of a marker
        return [Text(held)]

    # Each step reads from the text held back and names the next one; None: it waits for more text.

    def _text(self) -> list[Event] | None:
        places = [at for opener in self._openers if (at := self._held.find(opener)) >= 0]
        if places:
            self._step = self._head
            return [Text(self._take(min(places)))]
        shown = self._take(len(self._held) - held_back(self._held, self._openers))
        return [Text(shown)] if shown else None

    def _head(self) -> list[Event] | None:
        try:
            found = self._read_head()
        except _Malformed:
            self._step = self._text
            return [Text(self._take(1))]  # no call begins here; the rest is looked at again
        if found is None:
            return None
        name, end = found
        self._take(end)
        self._step = self._arguments
        self._object = _ObjectEnd()
        self._count += 1
        return [CallBegin(self._count - 1, self._new_id(), name)]

    def _arguments(self) -> list[Event] | None:
        end = self._object.find(self._held)
        fragment = self._take(len(self._held) if end is None else end)
        events: list[Event] = [Arguments(self._count - 1, fragment)] if fragment else []
        if end is not None:
            self._step = self._tail
            events.append(CallEnd(self._count - 1))
        return events

    def _tail(self) -> list[Event] | None:
        """The call's last parts, or only the last one where the arguments were broken."""
        if (found := self._read_one(self._syntax.after, self._syntax.after[-1:])) is not None:
            _, end = found
            self._take(end)
            self._step = self._between if end else self._text
        return None if found is None else []

    def _between(self) -> list[Event] | None:
        """Another call, or the end of all."""
        call = self._syntax.call
        if (found := self._read_one((call,), (self._syntax.end,))) is not None:
            parts, end = found
            self._take(end - len(call) if parts == (call,) else end)
            self._step = self._head if parts == (call,) else self._text
        return None if found is None else []

    def _read_one(self, *ways: tuple[str, ...]) -> tuple[tuple[str, ...], int] | None:
        """(the way the text begins with, where it ends), ((), 0) for none, None while the text may become one."""
        waits = False
        for parts in filter(any, ways):
            try:
                end = _read(parts, self._held, 0)
            except _Malformed:
                continue
            if end is not None:
                return parts, end
            waits = True
        return None if waits else ((), 0)

    def _read_head(self) -> tuple[str, int] | None:
        """(name, where the arguments begin), None while the text may become one. Raises _Malformed."""
        syntax, held = self._syntax, self._held
        parts = syntax.before_name
        if syntax.begin and held.startswith(syntax.begin):
            parts = (syntax.begin, *parts)
        if (at := _read(parts, held, 0)) is None:
            return None
        at = _after_space(held, at)
        name = _name_at(held, at)
        if at + len(name) == len(held):
            return None
        if name not in self._names:
            raise _Malformed
        end = _read((*syntax.before_arguments, "{"), held, at + len(name))
        return None if end is None else (name, end - 1)

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken


class _ObjectEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The place behind the object, or of what no JSON has outside of strings (a marker, a fence)."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
            elif character in "<`":
                return i
        return None


def _read(parts: Iterable[str], text: str, at: int) -> int | None:
    """Where `parts` end that stand at `at`, None while the text may become them. Raises _Malformed."""
    for part in parts:
        at = _after_space(text, at)
        wanted = part.strip()
        found = text[at : at + len(wanted)]
        if found != wanted:
            if wanted.startswith(found):
                return None
            raise _Malformed
        at += len(wanted)
    return at


def _after_space(text: str, at: int) -> int:
    window = text[at : at + MOST_SPACE + 1]
    space = len(window) - len(window.lstrip())
    if space > MOST_SPACE:
        raise _Malformed
    return at + space


_NAME = re.compile(r"[A-Za-z0-9_-]{0,65}")  # one more than a name may have


def _name_at(text: str, at: int) -> str:
    found = _NAME.match(text, at)
    assert found is not None
    if len(found.group()) > 64:
        raise _Malformed
    return found.group()


def _merged(events: list[Event]) -> list[Event]:
    """Neighbouring texts as one, no empty ones."""
    merged: list[Event] = []
    for event in events:
        if isinstance(event, Text) and merged and isinstance(before := merged[-1], Text):
            merged[-1] = Text(before.text + event.text)
        elif event != Text(""):
            merged.append(event)
    return merged


# ---- what a client is sent ------------------------------------------------------------------------------------------


class FunctionDelta(msgspec.Struct, frozen=True):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to a call; the first of a call has all fields."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


def call_delta(event: CallBegin | Arguments) -> ToolCallDelta:
    if isinstance(event, CallBegin):
        function = FunctionDelta(arguments="", name=event.name)
        return ToolCallDelta(index=event.index, id=event.id, type="function", function=function)
    return ToolCallDelta(index=event.index, function=FunctionDelta(arguments=event.fragment))


def collected(events: Iterable[Event]) -> tuple[str, list[ToolCall]]:
    """(text, calls) of a whole answer."""
    texts: list[str] = []
    begun: list[CallBegin] = []
    arguments: list[list[str]] = []
    for event in events:
        if isinstance(event, Text):
            texts.append(event.text)
        elif isinstance(event, CallBegin):
            begun.append(event)
            arguments.append([])
        elif isinstance(event, Arguments):
            arguments[event.index].append(event.fragment)
    calls = [
        ToolCall(id=call.id, function=CalledFunction(call.name, "".join(fragments)))
        for call, fragments in zip(begun, arguments, strict=True)
    ]
    return "".join(texts), calls


def finish_reason(finish: str | None, called: bool) -> str | None:
    """An answer that the model ended after calls ends for them; one that was cut short says so."""
    return "tool_calls" if called and finish == "stop" else finish

"""Tool calls: what a client offers and has been answered, as the chat template and the model write it, and back.

A request's way: `check_tools` -> `template_messages` and `template_tools` -> the template -> `tool_grammar` for the
worker; the model's answer -> `ToolParser` -> `call_delta` or `collected`.

| syntax         | checkpoints                      | a call                                                           |
|----------------|----------------------------------|------------------------------------------------------------------|
| DEEPSEEK_V3    | DeepSeek V2.5, V3, V3-0324, R1   | `function<｜tool▁sep｜>NAME`, then the arguments in a json fence |
| DEEPSEEK_V31   | DeepSeek V3.1, V3.2-Exp          | `NAME<｜tool▁sep｜>ARGUMENTS`                                    |
| HERMES         | any other: the prompt teaches it | `<tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call>`  |
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from common.errors import InvalidRequest
from common.messages import Grammar
from services.gateway.protocol import CalledFunction, ChatMessage, ChosenTool, Function, Tool, ToolCall
from services.gateway.stops import held_back

MAX_TOOLS = 128
MOST_DEPTH = 100  # of a JSON schema
MOST_SPACE = 16  # characters of white space that a call may have between its parts

# ---- what a client sends --------------------------------------------------------------------------------------------

ToolChoice = Literal["none", "auto", "required"] | ChosenTool


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """What the types cannot say. Raises InvalidRequest."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(tools)} tools are over the limit of {MAX_TOOLS}", "tools")
    names: set[str] = set()
    for i, tool in enumerate(tools):
        _check_function(tool.function, names, f"tools[{i}].function")
        names.add(tool.function.name)
    if isinstance(choice, ChosenTool) and choice.function.name not in names:
        raise InvalidRequest(f"no tool is named {choice.function.name!r}", "tool_choice.function.name")
    if choice == "required" and not tools:
        raise InvalidRequest("tool_choice is required and there are no tools: name some in tools", "tool_choice")


def _check_function(function: Function, names: Collection[str], param: str) -> None:
    if function.name in names:
        raise InvalidRequest(f"two tools are named {function.name!r}", f"{param}.name")
    if function.name.endswith("\n"):  # which `$` lets through
        raise InvalidRequest("the name ends in a newline", f"{param}.name")
    schema = parameters_of(function)
    if schema["type"] != "object":
        raise InvalidRequest("parameters must be the schema of an object (type: object)", f"{param}.parameters")
    if _deeper_than(MOST_DEPTH, schema):
        raise InvalidRequest(f"parameters are nested more than {MOST_DEPTH} deep", f"{param}.parameters")


def parameters_of(function: Function) -> dict[str, Any]:
    """The arguments' JSON schema; a function without `parameters` takes none."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object"} | function.parameters


def _deeper_than(depth: int, value: Any) -> bool:
    level = [value]
    for _ in range(depth):
        parents = [value for value in level if isinstance(value, (dict, list))]
        level = [child for value in parents for child in (value.values() if isinstance(value, dict) else value)]
    return bool(level)


# ---- how calls are written ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Syntax:
    """A call is `before_name` NAME `before_arguments` ARGUMENTS `after`; all calls stand between `begin` and `end`.

    Parts are written as they are. White space around them does not matter when they are read.
    """

    before_name: tuple[str, ...]
    before_arguments: tuple[str, ...]
    after: tuple[str, ...]
    begin: str = ""
    between: str = ""
    end: str = ""

    @property
    def call(self) -> str:
        """The marker that every call begins with."""
        return self.before_name[0]

    @property
    def markers(self) -> tuple[str, ...]:
        """The parts that a vocabulary may have as one token: the parser must see their text."""
        parts = (self.begin, self.end, *self.before_name, *self.before_arguments, *self.after)
        return tuple(part for part in parts if _is_marker(part))

    def write(self, calls: Iterable[CalledFunction]) -> str:
        return self.begin + self.between.join(map(self._write_call, calls)) + self.end

    def _write_call(self, call: CalledFunction) -> str:
        return "".join((*self.before_name, call.name, *self.before_arguments, call.arguments, *self.after))


_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _CALL_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"

DEEPSEEK_V3 = Syntax(
    begin=_CALLS_BEGIN,
    before_name=(_CALL_BEGIN, "function", _SEP),
    before_arguments=("\n```json\n",),
    after=("\n```", _CALL_END),
    between="\n",
    end=_CALLS_END,
)
DEEPSEEK_V31 = Syntax(
    begin=_CALLS_BEGIN,
    before_name=(_CALL_BEGIN,),
    before_arguments=(_SEP,),
    after=(_CALL_END,),
    end=_CALLS_END,
)
HERMES = Syntax(
    before_name=("<tool_call>", "\n{", '"name"', ": ", '"'),
    before_arguments=('"', ", ", '"arguments"', ": "),
    after=("}\n", "</tool_call>"),
    between="\n",
)


def _is_marker(part: str) -> bool:
    return part.startswith("<") and part.endswith(">")


# ---- what the chat template knows -----------------------------------------------------------------------------------

Render = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str]


@dataclass(frozen=True)
class ToolFormat:
    """`native`: the template writes calls and results itself; otherwise they are written into the messages' text.
    `arguments_as_text`: it wants a call's arguments as JSON text, not as an object. `text_apart`: it would drop one
    of text and calls that stand in one message. `described`: it tells the model of the `tools` it is given; otherwise
    a system message does."""

    syntax: Syntax
    native: bool = False
    arguments_as_text: bool = False
    text_apart: bool = False
    described: bool = False


_PROBE = Tool("function", Function("probe_name", "probe_description", {"properties": {}}))
_PROBE_CALL = CalledFunction("probe_name", '{"probe": 1}')


def tool_format(render: Render) -> ToolFormat:
    """Found by having the template write a call: how it spells one in Jinja does not matter, what comes out does."""
    for as_text in (False, True):
        alone, with_text = _probe("", as_text), _probe("probe_text", as_text)
        try:
            text, joined = render(alone, {}), render(with_text, {})
            told = render(alone, {"tools": template_tools([_PROBE])})
        except InvalidRequest:
            continue
        for syntax in (DEEPSEEK_V3, DEEPSEEK_V31, HERMES):
            if "probe_result" in text and _reads_probe(syntax, text):
                apart = "probe_text" not in joined or not _reads_probe(syntax, joined)
                return ToolFormat(syntax, True, as_text, apart, "probe_description" in told)
    return ToolFormat(HERMES)


def _probe(text: str, as_text: bool) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "probe_question"},
        _native_calls(text, [ToolCall(id="probe_id", function=_PROBE_CALL)], as_text),
        {"role": "tool", "tool_call_id": "probe_id", "content": "probe_result"},
    ]


def _reads_probe(syntax: Syntax, text: str) -> bool:
    parser = ToolParser(syntax, {_PROBE_CALL.name})
    _, calls = collected([*parser.push(text), *parser.flush()])
    written = [(call.function.name, "".join(call.function.arguments.split())) for call in calls]
    return written == [(_PROBE_CALL.name, "".join(_PROBE_CALL.arguments.split()))]


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """What a template that describes tools gets as `tools`: with every key, as some join them without a look."""
    return [
        {
            "type": "function",
            "function": {"name": f.name, "description": f.description or "", "parameters": parameters_of(f)},
        }
        for f in (tool.function for tool in tools)
    ]


def template_messages(turns: Sequence[ChatMessage], tools: Sequence[Tool], form: ToolFormat) -> list[dict[str, Any]]:
    """The messages as the template takes them, `tools` described in them where it does not. Raises InvalidRequest."""
    messages: list[dict[str, Any]] = []
    before = ""
    for i, turn in _in_call_order(turns):
        if turn.tool_calls and turn.role == "assistant":
            _check_arguments(turn.tool_calls, f"messages[{i}].tool_calls")
            messages += assistant_tool_calls(turn.text, turn.tool_calls, form)
        elif turn.role != "tool":
            # Templates know no developer; what OpenAI calls so now is what it called system before.
            messages.append({"role": "system" if turn.role == "developer" else turn.role, "content": turn.text})
        elif form.native:
            messages.append({"role": "tool", "tool_call_id": turn.tool_call_id, "content": turn.text})
        elif before == "tool":
            messages[-1]["content"] += f"\n{_told_result(turn.text)}"  # some templates want one turn of the user's
        else:
            messages.append({"role": "user", "content": _told_result(turn.text)})
        before = turn.role
    return messages if form.described or not tools else _with_system(messages, describe_tools(tools, form.syntax))


def _told_result(text: str) -> str:
    return f"<tool_response>\n{text}\n</tool_response>"


def assistant_tool_calls(text: str, calls: Sequence[ToolCall], form: ToolFormat) -> list[dict[str, Any]]:
    """An assistant's message with calls, whose arguments are JSON objects; two messages where the template needs it."""
    if not form.native:
        told = [CalledFunction(call.function.name, call.function.arguments or "{}") for call in calls]
        written = form.syntax.write(told)
        return [{"role": "assistant", "content": f"{text}\n{written}" if text else written}]
    if text and form.text_apart:
        return [{"role": "assistant", "content": text}, _native_calls("", calls, form.arguments_as_text)]
    return [_native_calls(text, calls, form.arguments_as_text)]


def describe_tools(tools: Sequence[Tool], syntax: Syntax) -> str:
    """For the system message of a template that does not mention tools."""
    form = syntax.write([CalledFunction("TOOL_NAME", "TOOL_ARGUMENTS")])
    return (
        "## Tools\n\n"
        + "".join(map(_described, tools))
        + f"To call a tool, end your answer with exactly this:\n{form}\n\n"
        "TOOL_NAME is the name of a tool above; TOOL_ARGUMENTS is one JSON object that is valid under the schema of "
        "its parameters. To call several tools, write one call after the other."
    )


def _described(tool: Tool) -> str:
    function = tool.function
    schema = json.dumps(parameters_of(function), ensure_ascii=False)
    return f"### {function.name}\nDescription: {function.description or ''}\n\nParameters: {schema}\n\n"


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _native_calls(text: str, calls: Sequence[ToolCall], as_text: bool) -> dict[str, Any]:
    """No text is None, which DeepSeek's templates tell apart from an empty one."""
    told = []
    for call in calls:
        arguments: Any = call.function.arguments or "{}"
        if not as_text:
            arguments = msgspec.json.decode(arguments)
        told.append(
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
        )
    return {"role": "assistant", "content": text or None, "tool_calls": told}


def _check_arguments(calls: Sequence[ToolCall], param: str) -> None:
    for i, call in enumerate(calls):
        try:
            msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(
                f"arguments must be a JSON object, as text: {error}", f"{param}[{i}].function.arguments"
            ) from None


def _in_call_order(turns: Sequence[ChatMessage]) -> list[tuple[int, ChatMessage]]:
    """(place in the request, turn), results in the order of the calls they answer: DeepSeek's templates write no ids,
    so that a result's place alone says which call it is of. Raises InvalidRequest for a result of no call."""
    ordered: list[tuple[int, ChatMessage]] = []
    places: dict[str | None, int] = {}  # id -> place, of the calls that were made last
    for are_results, group in groupby(enumerate(turns), key=lambda item: item[1].role == "tool"):
        run = list(group)
        if are_results:
            for i, turn in run:
                if turn.tool_call_id not in places:
                    raise InvalidRequest(
                        f"tool_call_id {turn.tool_call_id!r} is of no call of the assistant's message before",
                        f"messages[{i}].tool_call_id",
                    )
            run.sort(key=lambda item: places[item[1].tool_call_id])
        else:
            places = {call.id: n for n, call in enumerate(run[-1][1].tool_calls or ())}
        ordered += run
    return ordered


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


# ---- what the model is held to --------------------------------------------------------------------------------------

# Enough to indent with, and never so much that a model loses itself in it.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n]{1,12}"}


def tool_grammar(
    tools: Sequence[Tool],
    choice: ToolChoice,
    syntax: Syntax,
    token_id: Callable[[str], int | None],
    *,
    parallel: bool = True,
    after: int | None = None,
) -> Grammar | None:
    """What holds the model to `choice`, in llguidance's Lark; None where it is free.

    "required" is one call or more, a named function exactly one call of it; with "auto" the model is held to its
    calls where some tool is strict, and to one call where they may not be `parallel`. `token_id`: of a marker that
    the vocabulary has as one token. `after`: see Grammar.
    """
    free = choice == "auto"
    if choice == "none" or (free and parallel and not any(tool.function.strict for tool in tools)):
        return None
    functions = [tool.function for tool in tools]
    if isinstance(choice, ChosenTool):
        functions = [function for function in functions if function.name == choice.function.name]
        parallel = False
    rules = _call_rules(functions, syntax, token_id, strict_only=free)
    rules["more"] = _terms((syntax.between, syntax.call), token_id) + " inner"
    first = "call" if syntax.begin else "inner"
    rules["calls"] = " ".join(filter(None, (first, "more*" if parallel else "", _terms((syntax.end,), token_id))))
    opener = _terms((syntax.begin or syntax.call,), token_id)
    if not free:
        rules["start"] = f"{opener} calls"
    else:
        # A marker that is text has to be found in the text: the shortest that ends with it.
        lazy = "[lazy]" if opener.startswith('"') else ""
        rules |= {"start": "TEXT | opening calls", f"opening{lazy}": f"TEXT {opener}", "TEXT": "/(?s:.*)/"}
    return Grammar("lark", "".join(f"{name}: {rule}\n" for name, rule in rules.items()), after)


def _call_rules(
    functions: Sequence[Function], syntax: Syntax, token_id: Callable[[str], int | None], *, strict_only: bool
) -> dict[str, str]:
    """`call`, and `inner`: a call without its first marker."""
    names = [f"function{i}" for i in range(len(functions))]
    rules = {
        "call": _terms((syntax.call,), token_id) + " inner",
        "inner": f"({' | '.join(names)}) " + _terms(syntax.after, token_id),
    }
    for rule, function in zip(names, functions, strict=True):
        held = function.strict or not strict_only
        schema = (parameters_of(function) if held else {"type": "object"}) | {"x-guidance": _JSON_OPTIONS}
        head = _terms((*syntax.before_name[1:], function.name, *syntax.before_arguments), token_id)
        rules[rule] = f"{head} %json {json.dumps(schema)}"
    return rules


def _terms(parts: Iterable[str], token_id: Callable[[str], int | None]) -> str:
    """The parts in Lark: markers by their token, the text between them in quotes."""

    def is_token(part: str) -> bool:
        return _is_marker(part) and token_id(part) is not None

    terms: list[str] = []
    for are_tokens, group in groupby(filter(None, parts), key=is_token):
        if are_tokens:
            terms += [f"<[{token_id(part)}]>" for part in group]
        else:
            terms.append(json.dumps("".join(group), ensure_ascii=False))
    return " ".join(terms)

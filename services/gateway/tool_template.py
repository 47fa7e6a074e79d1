"""Tools and calls as the chat template of a checkpoint takes them, or as text where it knows none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec

from common.errors import InvalidRequest
from services.gateway.protocol import CalledFunction, ChatMessage, Function, Tool, ToolCall
from services.gateway.tool_parser import ToolParser, collected
from services.gateway.tools import DEEPSEEK_V3, DEEPSEEK_V31, HERMES, Syntax, parameters_of

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

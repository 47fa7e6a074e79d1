"""Tool calls: read back whatever was written, however the text is cut; grammars that llguidance compiles."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import llguidance
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from tokenizers import AddedToken
from tokenizers import Tokenizer as HfTokenizer

from common.errors import InvalidRequest
from services.gateway.protocol import (
    CalledFunction,
    ChatMessage,
    ChosenFunction,
    ChosenTool,
    Function,
    Tool,
    ToolCall,
    param_of,
)
from services.gateway.tokenizer import ChatTemplate, Tokenizer
from services.gateway.tool_parser import (
    Arguments,
    CallBegin,
    CallEnd,
    Event,
    Text,
    ToolParser,
    call_delta,
    collected,
    finish_reason,
)
from services.gateway.tool_template import (
    ToolFormat,
    assistant_tool_calls,
    template_messages,
    template_tools,
    tool_format,
)
from services.gateway.tools import DEEPSEEK_V3, DEEPSEEK_V31, HERMES, Syntax, ToolChoice, check_tools, tool_grammar

TINY = Tokenizer("models/tiny")
EOS = 1
SYNTAXES = {"v3": DEEPSEEK_V3, "v31": DEEPSEEK_V31, "hermes": HERMES}
each_syntax = pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES.keys())
any_syntax = st.sampled_from(list(SYNTAXES.values()))

V3_CALL = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>'
V31_CALL = '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARIS = CalledFunction("weather", '{"city": "Paris"}')


def tool(name: str, properties: dict[str, Any] | None = None, **fields: Any) -> Tool:
    schema = {"type": "object", "properties": properties or {}, "additionalProperties": False}
    return Tool("function", Function(name, parameters=schema | {"required": list(properties or {})}, **fields))


WEATHER = tool("weather", {"city": {"enum": ["Paris", "Oslo"]}}, description="How the weather is.")
WEATHER_WEEK = tool("weather-week", {"days": {"type": "integer"}})
CLOCK = Tool("function", Function("clock"))
TOOLS = [WEATHER, WEATHER_WEEK, CLOCK]
NAMES = {tool.function.name for tool in TOOLS}


# ---- what a client sends --------------------------------------------------------------------------------------------


class Body(msgspec.Struct):
    tools: list[Tool]
    tool_choice: ToolChoice = "auto"


def refusal(tools: list[dict[str, Any]], choice: Any = "auto") -> tuple[str | None, str]:
    """(param, message) of a body that must be refused."""
    with pytest.raises((InvalidRequest, msgspec.ValidationError)) as caught:
        body = msgspec.json.decode(json.dumps({"tools": tools, "tool_choice": choice}), type=Body)
        check_tools(body.tools, body.tool_choice)
    message = str(caught.value)
    return (caught.value.param if isinstance(caught.value, InvalidRequest) else param_of(message)), message


def offer(name: str = "weather", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | fields}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "not": schema}
    return schema


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([offer("")], "auto", "tools[0].function.name"),
        ([offer("a b")], "auto", "tools[0].function.name"),
        ([offer("a\n")], "auto", "tools[0].function.name"),
        ([offer("a" * 65)], "auto", "tools[0].function.name"),
        ([offer(), offer()], "auto", "tools[1].function.name"),
        ([offer(str(i)) for i in range(129)], "auto", "tools"),
        ([{"type": "custom", "function": {"name": "f"}}], "auto", "tools[0].type"),
        ([offer(parameters={"type": "array"})], "auto", "tools[0].function.parameters"),
        ([offer(parameters={"type": ["object", "null"]})], "auto", "tools[0].function.parameters"),
        ([offer(parameters=nested(200))], "auto", "tools[0].function.parameters"),
        ([offer(parameters=7)], "auto", "tools[0].function.parameters"),
        ([], "required", "tool_choice"),
        ([offer()], "always", "tool_choice"),
        ([offer()], {"type": "function", "function": {"name": "clock"}}, "tool_choice.function.name"),
        ([offer()], {"type": "function"}, "tool_choice"),
    ],
)
def test_wrong_tools_are_refused_with_their_place(tools: list[dict[str, Any]], choice: Any, param: str) -> None:
    said, message = refusal(tools, choice)
    assert said == param or (said or "").startswith(param), message


def test_right_tools_pass() -> None:
    most = [offer(f"tool-{i}_A"[:64], parameters={"properties": {}}) for i in range(126)]
    tools = [*most, offer("b" * 64, parameters=nested(40), strict=True), offer("c", description="", parameters=None)]
    for choice in ("none", "auto", "required", {"type": "function", "function": {"name": "c"}}):
        body = msgspec.json.decode(json.dumps({"tools": tools, "tool_choice": choice}), type=Body)
        check_tools(body.tools, body.tool_choice)
    check_tools([], "auto")
    check_tools([], "none")


# ---- chat templates -------------------------------------------------------------------------------------------------

TURNS = """
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- elif m.tool_calls is defined %}{{ '<｜Assistant｜>' + (m.content if m.content is not none else '') }}
CALLS
{%- else %}{{ '<｜Assistant｜>' + m.content }}{%- endif %}
{%- endfor %}"""
LISTED = "{{ tools | tojson if tools is defined else '' }}"
V3_CALLS = """
{{- '<｜tool▁calls▁begin｜>' }}
{%- for c in m.tool_calls %}{{ '' if loop.first else '\n' }}
{{- '<｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>' + c['function']['name'] + '\n```json\n' + ARGUMENTS }}
{{- '\n```<｜tool▁call▁end｜>' }}{%- endfor %}{{ '<｜tool▁calls▁end｜>' }}"""
V31_CALLS = """
{{- '<｜tool▁calls▁begin｜>' }}
{%- for c in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + c['function']['name'] + '<｜tool▁sep｜>' + ARGUMENTS }}
{{- '<｜tool▁call▁end｜>' }}{%- endfor %}{{ '<｜tool▁calls▁end｜>' }}"""
HERMES_CALLS = """
{%- for c in m.tool_calls %}{{ '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + ARGUMENTS }}
{{- '}\n</tool_call>' }}{%- endfor %}"""
TEXT_ARGUMENTS, JSON_ARGUMENTS = "c['function']['arguments']", "c['function']['arguments'] | tojson"


def template(calls: str, arguments: str, tools: str = "") -> Callable[..., str]:
    source = tools + TURNS.replace("CALLS", calls).replace("ARGUMENTS", arguments)
    return ChatTemplate(source, {}).render


@pytest.mark.parametrize("tools", ["", LISTED], ids=["silent", "described"])
@pytest.mark.parametrize("arguments", [TEXT_ARGUMENTS, JSON_ARGUMENTS], ids=["text", "object"])
@pytest.mark.parametrize(
    ("calls", "syntax"),
    [(V3_CALLS, DEEPSEEK_V3), (V31_CALLS, DEEPSEEK_V31), (HERMES_CALLS, HERMES)],
    ids=["v3", "v31", "hermes"],
)
def test_a_template_tells_its_format(calls: str, syntax: Syntax, arguments: str, tools: str) -> None:
    expected = ToolFormat(syntax, True, arguments is TEXT_ARGUMENTS, described=tools is LISTED)
    assert tool_format(template(calls, arguments, tools)) == expected


def test_a_template_without_calls_gets_them_in_the_text() -> None:
    assert tool_format(TINY.render) == ToolFormat(HERMES)
    assert tool_format(ChatTemplate(None, {}).render) == ToolFormat(HERMES)
    assert tool_format(ChatTemplate("{{ raise_exception('no tools here') }}", {}).render) == ToolFormat(HERMES)
    blind = TURNS.replace("+ m.content + '<｜tool▁output", "+ '<｜tool▁output")
    source = blind.replace("CALLS", V3_CALLS).replace("ARGUMENTS", TEXT_ARGUMENTS)
    assert tool_format(ChatTemplate(source, {}).render) == ToolFormat(HERMES), "it shows no results"


def called(call_id: str, name: str, arguments: str) -> ToolCall:
    return ToolCall(id=call_id, function=CalledFunction(name, arguments))


HISTORY = [
    ChatMessage("developer", "Be brief."),
    ChatMessage("user", "Paris?"),
    ChatMessage("assistant", "", tool_calls=[called("a", "weather", '{"city":"Paris"}'), called("b", "clock", "")]),
    ChatMessage("tool", "noon", tool_call_id="b"),
    ChatMessage("tool", "sun", tool_call_id="a"),
    ChatMessage("assistant", "Sunny at noon."),
]


@pytest.mark.parametrize("arguments", [TEXT_ARGUMENTS, JSON_ARGUMENTS], ids=["text", "object"])
@pytest.mark.parametrize("calls", [V3_CALLS, V31_CALLS, HERMES_CALLS], ids=["v3", "v31", "hermes"])
def test_a_history_of_calls_comes_back_from_the_rendered_prompt(calls: str, arguments: str) -> None:
    render = template(calls, arguments)
    form = tool_format(render)
    text = render(template_messages(HISTORY, [], form), {})
    assert [(c.name, json.loads(c.arguments)) for c in parsed(form.syntax, text)[1]] == [
        ("weather", {"city": "Paris"}),
        ("clock", {}),
    ]
    assert text.index("sun") < text.index("noon"), "results stand in the order of the calls"


def test_a_history_of_calls_as_text() -> None:
    messages = template_messages(HISTORY, [], tool_format(TINY.render))
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert parsed(HERMES, messages[2]["content"]) == (
        "",
        [CalledFunction("weather", '{"city":"Paris"}'), CalledFunction("clock", "{}")],
    )
    assert messages[3]["content"] == ("<tool_response>\nsun\n</tool_response>\n<tool_response>\nnoon\n</tool_response>")
    assert "noon" in TINY.render(messages, {})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("m.tool_calls is defined", "m.tool_calls is defined and m.content is none"),
        ("(m.content if m.content is not none else '')", "''"),
    ],
    ids=["calls", "text"],
)
def test_a_template_that_drops_calls_or_the_text_beside_them_gets_both_apart(old: str, new: str) -> None:
    source = TURNS.replace(old, new).replace("CALLS", V3_CALLS).replace("ARGUMENTS", TEXT_ARGUMENTS)
    render = ChatTemplate(source, {}).render
    form = tool_format(render)
    assert form.text_apart
    text = render(
        template_messages([ChatMessage("assistant", "Look:", tool_calls=HISTORY[2].tool_calls)], [], form), {}
    )
    assert "Look:" in text and len(parsed(form.syntax, text)[1]) == 2


def test_an_assistants_text_stays_before_its_calls() -> None:
    call = called("a", "clock", '{"x": 1}')
    assert assistant_tool_calls("Look:", [call], ToolFormat(HERMES))[0]["content"] == (
        'Look:\n<tool_call>\n{"name": "clock", "arguments": {"x": 1}}\n</tool_call>'
    )
    (as_object,) = assistant_tool_calls("", [call], ToolFormat(DEEPSEEK_V3, native=True))
    assert as_object == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "clock", "arguments": {"x": 1}}}],
    }
    (as_text,) = assistant_tool_calls("Look:", [call], ToolFormat(DEEPSEEK_V3, native=True, arguments_as_text=True))
    assert as_text["content"] == "Look:"
    assert as_text["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'


@pytest.mark.parametrize(
    ("turns", "param"),
    [
        ([ChatMessage("tool", "sun", tool_call_id="a")], "messages[0].tool_call_id"),
        ([*HISTORY[:3], ChatMessage("tool", "sun", tool_call_id="c")], "messages[3].tool_call_id"),
        ([*HISTORY, ChatMessage("tool", "sun", tool_call_id="a")], "messages[6].tool_call_id"),
        (
            [ChatMessage("assistant", "", tool_calls=[called("a", "f", "[1]")])],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [ChatMessage("assistant", "", tool_calls=[called("a", "f", "{")])],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [ChatMessage("assistant", "", tool_calls=[called("a", "f", "[" * 9999)])],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_a_history_that_does_not_fit_is_refused(turns: list[ChatMessage], param: str, native: bool) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template_messages(turns, [], ToolFormat(DEEPSEEK_V3, native))
    assert caught.value.param == param


@each_syntax
def test_tools_are_described_where_the_template_does_not(syntax: Syntax) -> None:
    turns = [ChatMessage("system", "Be brief."), ChatMessage("user", "Paris?")]
    told = template_messages(turns, TOOLS, ToolFormat(syntax))
    assert [message["role"] for message in told] == ["system", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n")
    for part in (*syntax.markers, "weather-week", "How the weather is.", json.dumps(WEATHER.function.parameters)):
        assert part in told[0]["content"]
    assert template_messages(turns[1:], TOOLS, ToolFormat(syntax))[0]["role"] == "system"
    described = ToolFormat(syntax, True, described=True)
    assert template_messages(turns, TOOLS, described) == template_messages(turns, [], ToolFormat(syntax))


def test_what_a_template_gets_as_tools() -> None:
    assert template_tools([WEATHER])[0]["function"] == {
        "name": "weather",
        "description": "How the weather is.",
        "parameters": WEATHER.function.parameters,
    }
    bare = template_tools([CLOCK])[0]["function"]
    assert bare["description"] == "" and bare["parameters"]["properties"] == {}


# ---- what the model writes ------------------------------------------------------------------------------------------


def events_of(syntax: Syntax, pieces: Sequence[str], names: set[str] = NAMES) -> list[Event]:
    """Neighbours joined; ids left out, as they are random."""
    parser = ToolParser(syntax, names, new_id=lambda: "call")
    events: list[Event] = []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.flush():
        last = events[-1] if events else None
        if isinstance(event, Text) and isinstance(last, Text):
            events[-1] = Text(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            events[-1] = Arguments(event.index, last.fragment + event.fragment)
        else:
            events.append(event)
    return events


def parsed(syntax: Syntax, text: str, names: set[str] = NAMES) -> tuple[str, list[CalledFunction]]:
    said, calls = collected(events_of(syntax, [text], names))
    return said, [call.function for call in calls]


def test_the_formats_are_written_as_deepseek_writes_them() -> None:
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    assert DEEPSEEK_V3.write([PARIS, PARIS]) == f"{begin}{V3_CALL}\n{V3_CALL}{end}"
    assert DEEPSEEK_V31.write([PARIS, PARIS]) == f"{begin}{V31_CALL}{V31_CALL}{end}"
    assert HERMES.write([PARIS, PARIS]) == f"{HERMES_CALL}\n{HERMES_CALL}"


def test_a_call_is_told_as_it_comes() -> None:
    parser = ToolParser(DEEPSEEK_V3, NAMES)
    head, rest = DEEPSEEK_V3.write([PARIS]).split('"Par')
    assert parser.push("Let me look. <｜tool▁ca") == [Text("Let me look. ")]
    begin, first = parser.push(head[len("<｜tool▁ca") :] + '"Par')
    assert isinstance(begin, CallBegin) and re.fullmatch(r"call_[0-9a-f]{24}", begin.id)
    assert (begin.index, begin.name) == (0, "weather")
    assert first == Arguments(0, '{"city": "Par')
    for character in 'is"':
        assert parser.push(character) == [Arguments(0, character)]
    assert parser.push(rest.removeprefix('is"')) == [Arguments(0, "}"), CallEnd(0)]
    assert parser.flush() == []


@each_syntax
def test_an_answer_cut_anywhere_shows_all_or_none_of_its_call(syntax: Syntax) -> None:
    whole = syntax.write([PARIS])
    for size in range(1, len(whole)):
        events = events_of(syntax, [whole[:size]])
        said, calls = collected(events)
        assert (said, len(calls)) in [(whole[:size], 0), ("", 1)]
        assert sum(isinstance(event, CallEnd) for event in events) == len(calls)


def test_no_more_is_held_back_than_a_call_can_have() -> None:
    for name in ("w" * 65, 'wether"'):
        text = '<tool_call>{"name": "' + name
        assert ToolParser(HERMES, NAMES).push(text) == [Text(text)]
    for text in ("<tool_call>x", "<tool_call>" + " " * 17, 'a <tool_call>{"name": "weather", "x'):
        assert ToolParser(HERMES, NAMES).push(text) == [Text(text)]


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (DEEPSEEK_V3, V3_CALL),
        (DEEPSEEK_V3, V3_CALL.replace("\n", "")),
        (DEEPSEEK_V3, V3_CALL.replace("\n```<", "<")),
        (DEEPSEEK_V31, V31_CALL.replace("<｜tool▁sep｜>", "\n<｜tool▁sep｜> \n")),
        (HERMES, HERMES_CALL.replace("\n", "")),
        (HERMES, HERMES_CALL.replace(" ", "").replace(":", " :\n")),
    ],
)
def test_white_space_between_the_parts_does_not_matter(syntax: Syntax, text: str) -> None:
    said, calls = parsed(syntax, f"A {text}\n\n{text}\n")
    assert said == "A "
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", {"city": "Paris"})] * 2


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (HERMES, HERMES_CALL.replace("weather", "wether")),
        (HERMES, HERMES_CALL.replace("weather", "w" * 65)),
        (HERMES, HERMES_CALL.replace('{"city": "Paris"}', '"Paris"')),
        (HERMES, "<tool_call>weather(Paris)</tool_call>"),
        (HERMES, "<tool_call>" + " " * 17 + '{"name": "weather", "arguments": {}}</tool_call>'),
        (HERMES, "use <tool_call>"),
        (HERMES, 'see <tool_call>\n{"name": "weath'),
        (DEEPSEEK_V3, DEEPSEEK_V3.write([CalledFunction("wether", "{}")])),
        (DEEPSEEK_V3, DEEPSEEK_V3.write([CalledFunction("weather", "Paris")])),
        (DEEPSEEK_V3, DEEPSEEK_V31.write([PARIS])),
        (DEEPSEEK_V31, DEEPSEEK_V31.write([CalledFunction("weather", "[1]")])),
        (DEEPSEEK_V31, "<｜tool▁calls▁begin｜> none <｜tool▁calls▁end｜>"),
    ],
)
def test_what_is_no_call_stays_text(syntax: Syntax, text: str) -> None:
    assert parsed(syntax, text) == (text, [])
    written = syntax.write([PARIS])
    assert parsed(syntax, f"{text}\n{written}") == (f"{text}\n", [PARIS]), "and a good one after it is found"


@pytest.mark.parametrize(
    ("syntax", "text", "arguments", "said"),
    [
        (HERMES, HERMES_CALL[: HERMES_CALL.index("ris")], '{"city": "Pa', ""),
        (HERMES, HERMES_CALL.replace("}}", ""), '{"city": "Paris"\n', ""),
        (HERMES, HERMES_CALL.replace("}}", "}").replace("\n</", "</"), '{"city": "Paris"}', ""),
        (DEEPSEEK_V3, V3_CALL.replace("}", ""), '{"city": "Paris"\n', ""),
        (DEEPSEEK_V31, V31_CALL.replace("}", ""), '{"city": "Paris"', ""),
        (DEEPSEEK_V31, V31_CALL.replace("}<", "}!<"), '{"city": "Paris"}', "!<｜tool▁call▁end｜>"),
    ],
)
def test_broken_arguments_end_where_they_break(syntax: Syntax, text: str, arguments: str, said: str) -> None:
    assert parsed(syntax, text) == (said, [CalledFunction("weather", arguments)])


texts = st.text(st.characters(codec="utf-8"), max_size=12)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
tricky = st.sampled_from(['"', "\\", "}", '"}', "</tool_call>", "```", "<｜tool▁call▁end｜>", "<tool_call>"])
values = st.recursive(
    leaves | tricky,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | tricky, inner, max_size=3),
    max_leaves=8,
)
names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
dumped = st.builds(
    lambda value, ascii, indent: json.dumps(value, ensure_ascii=ascii, indent=indent),
    st.dictionaries(texts | tricky, values, max_size=4),
    st.booleans(),
    st.sampled_from([None, 2]),
)
calls = st.lists(st.builds(CalledFunction, names, dumped), min_size=1, max_size=4)
prose = st.text(st.characters(codec="utf-8", exclude_characters="<｜"), max_size=20)


@given(any_syntax, calls, prose)
def test_what_was_written_is_read_back(syntax: Syntax, calls: list[CalledFunction], before: str) -> None:
    text = before + syntax.write(calls)
    assert parsed(syntax, text, {call.name for call in calls}) == (before, calls)


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(bounds)]


def soup(syntax: Syntax) -> st.SearchStrategy[str]:
    """Texts of calls, markers and parts of them, in any order."""
    parts = [*syntax.markers, *syntax.before_name, *syntax.before_arguments, *syntax.after, "weather", "clock", "\n"]
    whole = [
        syntax.write([PARIS]),
        syntax.write([PARIS, CalledFunction("clock", "{}")]),
        '{"a": "',
        '"',
        "{}",
        "}",
        " ",
    ]
    pieces = st.sampled_from([part for part in parts if part] + whole) | st.text('<｜tool▁{}`" \n', max_size=3)
    halved = st.builds(lambda piece, at: piece[at % (len(piece) + 1) :], pieces, st.integers(0, 40))
    return st.lists(pieces | halved, max_size=16).map("".join)


soups = any_syntax.flatmap(lambda syntax: st.tuples(st.just(syntax), soup(syntax)))
cuts = st.lists(st.integers(0, 1000), max_size=30)


@given(soups, cuts)
def test_any_cut_of_the_text_reads_the_same(drawn: tuple[Syntax, str], places: list[int]) -> None:
    syntax, text = drawn
    whole = events_of(syntax, [text])
    assert events_of(syntax, cut(text, places)) == whole
    assert events_of(syntax, list(text)) == whole


@given(soups)
def test_nothing_is_lost_where_no_tool_is_known(drawn: tuple[Syntax, str]) -> None:
    syntax, text = drawn
    assert parsed(syntax, text, set()) == (text, [])


@given(soups)
def test_calls_are_told_in_order_and_each_ends_once(drawn: tuple[Syntax, str]) -> None:
    syntax, text = drawn
    told = [(type(e), e.index) for e in events_of(syntax, [text]) if isinstance(e, CallBegin | CallEnd)]
    assert told == [(kind, i) for i in range(len(told) // 2) for kind in (CallBegin, CallEnd)]


# ---- what a client is sent ------------------------------------------------------------------------------------------


def test_the_bodies_of_calls() -> None:
    encode = msgspec.json.encode
    assert json.loads(encode(call_delta(CallBegin(1, "call_7", "clock")))) == {
        "index": 1,
        "id": "call_7",
        "type": "function",
        "function": {"name": "clock", "arguments": ""},
    }
    assert json.loads(encode(call_delta(Arguments(1, "{}")))) == {"index": 1, "function": {"arguments": "{}"}}
    assert json.loads(encode(called("call_7", "clock", "{}"))) == {
        "id": "call_7",
        "type": "function",
        "function": {"name": "clock", "arguments": "{}"},
    }


def test_ids_differ() -> None:
    events = ToolParser(HERMES, NAMES).push(HERMES.write([PARIS] * 3))
    assert len({event.id for event in events if isinstance(event, CallBegin)}) == 3


def test_the_reason_to_finish() -> None:
    assert finish_reason("stop", called=True) == "tool_calls"
    assert finish_reason("stop", called=False) == "stop"
    assert finish_reason("length", called=True) == "length"
    assert finish_reason(None, called=True) is None


# ---- grammars -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """models/tiny's, with the markers of calls as tokens or without."""

    text: HfTokenizer
    grammars: llguidance.LLTokenizer

    def token_id(self, marker: str) -> int | None:
        found: int | None = self.text.token_to_id(marker)
        return found

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.text.encode(text, add_special_tokens=False).ids
        return ids


@cache
def vocabulary(with_markers: bool) -> Vocabulary:
    tokenizer = HfTokenizer.from_file("models/tiny/tokenizer.json")
    if with_markers:
        markers = dict.fromkeys(marker for syntax in SYNTAXES.values() for marker in syntax.markers)
        tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in markers])
    return Vocabulary(tokenizer, llguidance.LLTokenizer(tokenizer.to_str(), eos_token=EOS))


class Held:
    """A model held to a grammar."""

    def __init__(self, words: Vocabulary, grammar: Any) -> None:
        assert grammar.kind == "lark"
        self.words = words
        self.matcher = LLMatcher(words.grammars, LLMatcher.grammar_from_lark(grammar.text))
        assert not self.matcher.is_error(), self.matcher.get_error() + grammar.text

    def may_say(self, text: str) -> bool:
        """Whether `text` is a whole answer."""
        tokens = self.words.encode(text)
        matcher = self.matcher.deep_copy()
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def babble(self, choose: random.Random, most: int = 300) -> str:
        """Tokens at random of those that are allowed, to the end."""
        matcher, tokens = self.matcher.deep_copy(), []
        while not matcher.is_stopped() and len(tokens) < most:
            allowed = [token for token, bias in enumerate(matcher.compute_logit_bias()) if bias]
            tokens.append(choose.choice(allowed))
            assert matcher.consume_token(tokens[-1]), matcher.get_error()
        shown = [token for token in tokens if token != EOS]
        return self.words.text.decode(shown, skip_special_tokens=False)


with_and_without = pytest.mark.parametrize("markers", [True, False], ids=["tokens", "text"])


def held(
    syntax: Syntax, choice: ToolChoice, markers: bool, tools: Sequence[Tool] = TOOLS, *, parallel: bool = True
) -> Held:
    words = vocabulary(markers)
    grammar = tool_grammar(tools, choice, syntax, words.token_id, parallel=parallel)
    return Held(words, grammar)


WEEK = CalledFunction("weather-week", '{"days": 7}')
NOW = CalledFunction("clock", "{}")
WRONG = [
    CalledFunction("weather", '{"city": "Rome"}'),
    CalledFunction("weather", "{}"),
    CalledFunction("weather", '{"days": 7}'),
    CalledFunction("wether", '{"city": "Paris"}'),
    CalledFunction("clock", '{"city": "Paris"}'),
    CalledFunction("weather", '{"city": "Paris"'),
]


@with_and_without
@each_syntax
def test_required_is_one_call_or_more(syntax: Syntax, markers: bool) -> None:
    model = held(syntax, "required", markers)
    for calls in ([PARIS], [WEEK], [NOW], [WEEK, PARIS, NOW]):
        assert model.may_say(syntax.write(calls)), calls
    for call in WRONG:
        assert not model.may_say(syntax.write([call])), call
        assert not model.may_say(syntax.write([PARIS, call])), call
    assert not model.may_say("")
    assert not model.may_say("Sunny.")
    assert not model.may_say("Sunny. " + syntax.write([PARIS]))


@with_and_without
@each_syntax
def test_a_named_function_is_called_once(syntax: Syntax, markers: bool) -> None:
    model = held(syntax, ChosenTool("function", ChosenFunction("weather")), markers)
    assert model.may_say(syntax.write([PARIS]))
    assert not model.may_say(syntax.write([WEEK]))
    assert not model.may_say(syntax.write([PARIS, PARIS]))


@with_and_without
@each_syntax
def test_calls_that_may_not_be_parallel(syntax: Syntax, markers: bool) -> None:
    required = held(syntax, "required", markers, parallel=False)
    assert required.may_say(syntax.write([PARIS])) and not required.may_say(syntax.write([PARIS, NOW]))
    auto = held(syntax, "auto", markers, parallel=False)
    assert auto.may_say("Sunny.") and auto.may_say("Look: " + syntax.write([PARIS]))
    assert not auto.may_say(syntax.write([PARIS, NOW]))


@with_and_without
@each_syntax
def test_a_strict_tool_is_held_to_its_schema_where_the_model_is_free(syntax: Syntax, markers: bool) -> None:
    strict = Tool("function", msgspec.structs.replace(WEATHER.function, strict=True))
    model = held(syntax, "auto", markers, [strict, WEATHER_WEEK])
    loose = CalledFunction("weather-week", '{"anything": [1]}')
    for text in ("", "Sunny <tool", syntax.write([PARIS]), "I look.\n" + syntax.write([PARIS, loose])):
        assert model.may_say(text), text
    for call in (WRONG[0], WRONG[1], CalledFunction("clock", "{}")):
        assert not model.may_say("I look. " + syntax.write([call])), call


def test_arguments_may_be_indented_but_not_spaced_without_end() -> None:
    model = held(HERMES, "required", False)
    assert model.may_say(HERMES.write([CalledFunction("weather", '{\n        "city": "Paris"\n}')]))
    assert not model.may_say(HERMES.write([CalledFunction("weather", '{%s"city": "Paris"}' % (" " * 40))]))


def test_a_free_model_has_no_grammar() -> None:
    assert tool_grammar(TOOLS, "auto", DEEPSEEK_V3, lambda _: None) is None
    strict = Tool("function", Function("clock", strict=True))
    assert tool_grammar([strict], "none", DEEPSEEK_V3, lambda _: None) is None


def test_a_grammar_begins_after_the_reasoning() -> None:
    assert tool_grammar(TOOLS, "required", HERMES, lambda _: None, after=7).after == 7
    assert tool_grammar(TOOLS, "required", HERMES, lambda _: None).after is None


@with_and_without
@each_syntax
def test_whatever_a_held_model_says_is_a_valid_call(syntax: Syntax, markers: bool) -> None:
    model = held(syntax, "required", markers, parallel=False)
    for seed in range(20):
        text = model.babble(random.Random(seed))
        said, calls = parsed(syntax, text)
        assert said == "" and len(calls) == 1, text
        arguments = json.loads(calls[0].arguments)
        if calls[0].name == "weather":
            assert list(arguments) == ["city"] and arguments["city"] in ("Paris", "Oslo")
        elif calls[0].name == "weather-week":
            assert list(arguments) == ["days"] and isinstance(arguments["days"], int)
        else:
            assert arguments == {}


plain = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), max_size=8)
kinds: list[tuple[dict[str, Any], st.SearchStrategy[Any]]] = [
    ({"type": "string"}, plain),
    ({"type": "integer"}, st.integers(-(10**6), 10**6)),
    ({"type": "boolean"}, st.booleans()),
    ({"enum": ["one", "}}", 3, None]}, st.sampled_from(["one", "}}", 3, None])),
    ({"type": "array", "items": {"type": "integer"}}, st.lists(st.integers(0, 99), max_size=3)),
]


@st.composite
def offers(draw: st.DrawFn) -> tuple[list[Tool], list[CalledFunction]]:
    """Tools, and valid calls of some."""
    tools, calls = [], []
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        properties = draw(st.dictionaries(plain, st.sampled_from(kinds), max_size=3))
        tools.append(tool(name, {key: schema for key, (schema, _) in properties.items()}))
        arguments = {key: draw(value) for key, (_, value) in properties.items()}
        indent = draw(st.sampled_from([None, 2]))
        calls.append(CalledFunction(name, json.dumps(arguments, ensure_ascii=False, indent=indent)))
    return tools, draw(st.lists(st.sampled_from(calls), min_size=1, max_size=3))


@given(any_syntax, offers(), st.booleans())
def test_a_grammar_takes_every_valid_call(
    syntax: Syntax, offer: tuple[list[Tool], list[CalledFunction]], markers: bool
) -> None:
    tools, calls = offer
    text = syntax.write(calls)
    assert held(syntax, "required", markers, tools).may_say(text)
    assert parsed(syntax, text, {tool.function.name for tool in tools}) == ("", calls)

"""Tools through /v1/chat/completions: what a worker is sent, and how an answer's calls reach the client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from common.settings import Settings
from tests.api_front import QUESTION, TOKENIZER, Front, make_front

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
NAMED = {"type": "function", "function": {"name": "add"}}
CALL = 'so</think>\n\nLet me see. <tool_call>\n{"name": "add", "arguments": {"a": 47}}\n</tool_call>'


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.3)):
        yield one


def prompt_of(front: Front) -> str:
    return b"".join(map(TOKENIZER.token_bytes, front.sent.prompt)).decode()


async def test_a_call_in_a_whole_answer(front: Front) -> None:
    front.says(CALL)
    choice = (await front.chat(tools=[ADD])).choices[0]
    assert (choice.finish_reason, choice.message.content.strip()) == ("tool_calls", "Let me see.")
    assert choice.message.reasoning_content == "so"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "add", {"a": 47})
    assert call.id.startswith("call_")


async def test_a_streamed_call(front: Front) -> None:
    front.says(CALL)
    chunks = [chunk async for chunk in await front.chat(tools=[ADD], stream=True)]
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls if call.id] == [(0, "add")]
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"a": 47}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == "Let me see."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_nothing_but_calls_has_no_content(front: Front) -> None:
    front.says(CALL.replace("Let me see. ", ""))
    assert (await front.chat(tools=[ADD])).choices[0].message.content is None


async def test_an_unknown_name_stays_text(front: Front) -> None:
    front.says(CALL.replace('"add"', '"subtract"'))
    choice = (await front.chat(tools=[ADD])).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert '"subtract"' in choice.message.content


async def test_the_model_is_told_of_tools_unless_none_may_be_called(front: Front) -> None:
    await front.chat(tools=[ADD])
    assert "Adds two numbers." in prompt_of(front)
    assert front.sent.sampling.grammar is None
    front.says(CALL)
    choice = (await front.chat(tools=[ADD], tool_choice="none")).choices[0]
    assert "Adds two numbers." not in prompt_of(front)
    assert choice.message.tool_calls is None and "<tool_call>" in choice.message.content


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
async def test_a_forced_call_is_a_grammar_after_the_reasoning(front: Front, choice: str | dict) -> None:
    await front.chat(tools=[ADD], tool_choice=choice)
    grammar = front.sent.sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.after) == ("lark", TOKENIZER.token_id("</think>"))
    assert "add" in grammar.text


async def test_one_call_at_a_time(front: Front) -> None:
    await front.chat(tools=[ADD], tool_choice="required")
    several = front.sent.sampling.grammar
    await front.chat(tools=[ADD], tool_choice="required", parallel_tool_calls=False)
    assert several is not None and front.sent.sampling.grammar != several


async def test_calls_and_results_go_into_the_prompt(front: Front) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 47}'}}
    history = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "132"},
    ]
    await front.chat(messages=history, tools=[ADD])
    assert "<tool_response>\n132\n</tool_response>" in prompt_of(front)
    assert '"arguments": {"a": 47}' in prompt_of(front)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [ADD, ADD]}, "tools[1].function.name", "two tools"),
        (
            {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "mul"}}},
            "tool_choice.function.name", "no tool is named",
        ),
        (
            {"tools": [ADD], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format", "send one",
        ),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_tools_is_said(front: Front, fields: dict, param: str, says: str) -> None:
    error = await front.refused(400, **fields)
    assert (error["param"], says in error["message"]) == (param, True), error

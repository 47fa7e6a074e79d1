"""/v1/responses as the openai SDK sees it: a real socket; the worker is a stand-in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from common.errors import InvalidRequest, Overloaded
from common.settings import Settings
from tests.api_front import EOS, PROMPT, TOKENIZER, Front, make_front, text_tokens

SAID = "4+5=9</think>\n\nIt is 132."
SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.3, body_limit=20_000)):
        yield one


async def respond(front: Front, **fields: Any) -> Response:
    return await front.client.responses.create(**({"model": "tiny", "input": "What is 47 + 85?"} | fields))


async def events_of(front: Front, **fields: Any) -> list[ResponseStreamEvent]:
    return [event async for event in await respond(front, stream=True, **fields)]


async def refused(front: Front, **fields: Any) -> dict[str, Any]:
    answer = await front.http.post("/v1/responses", json={"model": "tiny", "input": "x"} | fields)
    assert answer.status_code == 400, answer.text
    assert front.worker.admitted == []
    return answer.json()["error"]


def prompt_of(front: Front) -> str:
    return b"".join(map(TOKENIZER.token_bytes, front.sent.prompt)).decode()


# ---- the whole answer


async def test_an_answer_with_its_reasoning(front: Front) -> None:
    front.worker.cached_tokens = 7
    answer = await respond(front, metadata={"a": "b"}, user="me")
    assert (answer.object, answer.status, answer.model) == ("response", "completed", "tiny")
    assert (answer.error, answer.incomplete_details) == (None, None)
    assert (answer.metadata, answer.user) == ({"a": "b"}, "me")
    assert answer.output_text == "It is 132."
    reasoning, message = answer.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "4+5=9", [])
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert list(front.sent.prompt) == PROMPT
    tokens = len(text_tokens(SAID)) + 1
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(PROMPT), tokens)
    assert answer.usage.total_tokens == len(PROMPT) + tokens
    assert answer.usage.input_tokens_details.cached_tokens == 7
    assert answer.usage.output_tokens_details.reasoning_tokens == len(text_tokens("4+5=9</think>"))


async def test_the_answer_has_all_that_the_sdk_requires(front: Front) -> None:
    answer = await front.http.post("/v1/responses", json={"model": "tiny", "input": "x"})
    Response.model_validate_json(answer.content)
    assert answer.json()["id"] == f"resp_{answer.headers['x-request-id']}"


async def test_what_the_worker_is_sent(front: Front) -> None:
    await respond(front, temperature=0.5, top_p=0.25, max_output_tokens=50, extra_body={"cache_salt": "s"})
    sampling = front.sent.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.25, 50)
    assert front.sent.salt == "s"


async def test_the_answer_says_what_was_applied(front: Front) -> None:
    answer = await respond(front, instructions="Be brief.", max_output_tokens=50)
    assert (answer.temperature, answer.top_p) == (0.6, 0.95), "as generation_config.json says"
    assert (answer.instructions, answer.max_output_tokens) == ("Be brief.", 50)
    assert (answer.text.format.type, answer.tools, answer.tool_choice) == ("text", [], "none")


async def test_output_that_was_cut_is_incomplete(front: Front) -> None:
    answer = await respond(front, max_output_tokens=len(text_tokens("4+5=9</think>\n\nIt")))
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.output[-1].status, answer.output_text) == ("incomplete", "It")


async def test_output_that_was_cut_while_it_reasons_has_no_message(front: Front) -> None:
    answer = await respond(front, max_output_tokens=2)
    assert [(item.type, item.status) for item in answer.output] == [("reasoning", "incomplete")]
    assert answer.output_text == ""


async def test_an_answer_without_a_word_is_a_message(front: Front) -> None:
    front.worker.script = lambda _: [EOS]
    answer = await respond(front)
    assert [(item.type, item.content[0].text) for item in answer.output] == [("message", "")]


# ---- the input


async def test_the_forms_of_the_input(front: Front) -> None:
    question = "What is 47 + 85?"
    for asked in (
        [{"role": "user", "content": question}],
        [{"type": "message", "role": "user", "content": question}],
        [{"role": "user", "content": [{"type": "input_text", "text": part} for part in ("What is 47 ", "+ 85?")]}],
    ):
        await respond(front, input=asked)
        assert list(front.sent.prompt) == PROMPT


async def test_an_answer_can_be_sent_back(front: Front) -> None:
    """All of its output, as agents do: the reasoning in it is not shown to the model again."""
    first = await respond(front)
    conversation = [
        {"role": "user", "content": "What is 47 + 85?"},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"role": "user", "content": "And 1 + 1?"},
    ]
    await respond(front, input=conversation)
    assert "It is 132." in prompt_of(front)
    assert "And 1 + 1?" in prompt_of(front)
    assert "4+5=9" not in prompt_of(front)


async def test_instructions_come_first(front: Front) -> None:
    await respond(front, instructions="Be brief.")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 47 + 85?"}]
    by_instructions = front.sent.prompt
    await front.chat(messages=chat)
    assert front.sent.prompt == by_instructions


# ---- what the output must be


async def test_a_schema_becomes_the_grammar_of_a_chat(front: Front) -> None:
    form = {"type": "json_schema", "name": "sum", "schema": SCHEMA, "strict": True}
    answer = await respond(front, text={"format": form})
    assert answer.text.format.type == "json_schema"
    grammar = front.sent.sampling.grammar
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", SCHEMA)
    schema = {"name": "sum", "schema": SCHEMA, "strict": True}
    await front.chat(response_format={"type": "json_schema", "json_schema": schema})
    assert front.sent.sampling.grammar == grammar


async def test_a_json_object_becomes_a_grammar(front: Front) -> None:
    await respond(front, text={"format": {"type": "json_object"}})
    assert front.sent.sampling.grammar is not None
    await respond(front, text={"format": {"type": "text"}})
    assert front.sent.sampling.grammar is None


async def test_a_schema_that_the_worker_refuses_names_our_field(front: Front) -> None:
    front.worker.refusals = [InvalidRequest("no such type", "response_format")]
    form = {"type": "json_schema", "name": "sum", "schema": {"type": "what"}}
    error = await refused(front, text={"format": form})
    assert (error["param"], error["code"]) == ("text.format", "invalid_request")


# ---- events

WHOLE = [
    "response.created",
    "response.in_progress",
    *("response.output_item.added", "response.content_part.added"),
    "response.reasoning_text.delta",
    *("response.reasoning_text.done", "response.content_part.done", "response.output_item.done"),
    *("response.output_item.added", "response.content_part.added"),
    "response.output_text.delta",
    *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
    "response.completed",
]


async def test_the_events_of_an_answer(front: Front) -> None:
    events = await events_of(front)
    kinds = [event.type for event in events]
    assert [kind for i, kind in enumerate(kinds) if kind not in kinds[i - 1 : i]] == WHOLE
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type.endswith(".delta")]
    assert len(deltas) > 4
    for kind, text, index in (("reasoning_text", "4+5=9", 0), ("output_text", "It is 132.", 1)):
        of_kind = [event for event in events if event.type.startswith(f"response.{kind}.")]
        assert "".join(event.delta for event in of_kind[:-1]) == of_kind[-1].text == text
        assert {(event.output_index, event.content_index) for event in of_kind} == {(index, 0)}
        assert len({event.item_id for event in of_kind}) == 1
    first, last = events[0].response, events[-1].response
    assert (first.status, first.output, first.usage) == ("in_progress", [], None)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert (last.id, last.status, last.output) == (first.id, "completed", done)
    assert last.usage.output_tokens == len(text_tokens(SAID)) + 1


async def test_the_sdk_follows_a_stream(front: Front) -> None:
    """Its helper checks the order of events and the identity of items."""
    async with front.client.responses.stream(model="tiny", input="What is 47 + 85?") as stream:
        texts = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert texts[-1] == final.output_text == "It is 132."


async def test_the_stream_on_the_wire(front: Front) -> None:
    body = {"model": "tiny", "input": "x", "stream": True}
    answer = await front.http.post("/v1/responses", json=body, headers={"x-request-id": "mine-1"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, nothing = answer.text.split("\n\n")
    assert nothing == ""
    for event in events:
        name, data = event.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
    assert json.loads(events[0].split("data: ")[1])["response"]["id"] == "resp_mine-1"


async def test_a_stream_that_was_cut_ends_with_incomplete(front: Front) -> None:
    events = await events_of(front, max_output_tokens=2)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"
    assert events[-1].response.output[0].status == "incomplete"


async def test_an_error_under_way_is_a_failed_response(front: Front) -> None:
    front.worker.end = {"finish": "error", "error": ("experts_unavailable", "shard 2 died")}
    events = await events_of(front)
    failed = events[-1]
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert (failed.response.error.message, failed.response.error.code) == ("shard 2 died", "server_error")
    assert failed.response.output[0].content[0].text == "4+5=9"
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_an_error_before_the_first_event_is_a_status(front: Front) -> None:
    front.scheduler.refusal = Overloaded("every queue is full")
    with pytest.raises(openai.RateLimitError):
        await respond(front, stream=True)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
async def test_a_client_that_leaves_aborts_the_request(front: Front, stream: bool) -> None:
    front.worker.pause_at = 3
    request = front.http.build_request("POST", "/v1/responses", json={"model": "tiny", "input": "x", "stream": stream})
    if stream:
        answer = await front.http.send(request, stream=True)
        await answer.aclose()
    else:
        with pytest.raises(openai.APITimeoutError):
            await front.client.with_options(timeout=0.2).responses.create(model="tiny", input="x")
    async with asyncio.timeout(5):
        await front.worker.abort_seen.wait()
    assert front.worker.aborted == [front.sent.request_id]


# ---- refusals


@pytest.mark.parametrize(
    ("body", "says", "param"),
    [
        ({"previous_response_id": "resp_1"}, "keeps no conversations", "previous_response_id"),
        ({"conversation": "conv_1"}, "keeps no conversations", "conversation"),
        ({"prompt": {"id": "p"}}, "no prompt templates", "prompt"),
        ({"background": True}, "background", "background"),
        ({"store": True}, "stores no answers", "store"),
        ({"tools": [{"type": "web_search"}]}, "/v1/chat/completions", "tools"),
        ({"tool_choice": "required"}, "/v1/chat/completions", "tool_choice"),
        ({"truncation": "auto"}, "shortens no input", "truncation"),
        ({"top_logprobs": 3}, "/v1/chat/completions", "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "cannot be included", "include[0]"),
        ({"max_output_tokens": 0}, ">= 1", "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens is 5000", "max_output_tokens"),
        ({"temperature": -1}, ">= 0", "temperature"),
        ({"top_p": 0}, "> 0", "top_p"),
        ({"input": []}, "length >= 1", "input"),
        ({"input": [{"type": "reasoning"}]}, "no message", "input"),
        ({"input": [{"role": "user"}]}, "no content", "input[0].content"),
        ({"input": [{"content": "x"}]}, "no role", "input[0].role"),
        ({"input": [{"type": "function_call"}]}, "'function_call'", "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input_image",
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "user", "content": "a" * 15_000}]}, "context", "input"),
        ({"text": {"format": {"type": "xml"}}}, "'xml'", "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "`schema`", "text.format.schema"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "length <= 16", "metadata"),
    ],
)
async def test_a_wrong_body_is_refused_with_its_path(
    front: Front, body: dict[str, Any], says: str, param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "context" in says:
        monkeypatch.setattr(front.gateway.generator.preparer, "context", 100)
    error = await refused(front, **body)
    assert says in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


async def test_values_that_ask_for_nothing_are_taken(front: Front) -> None:
    await respond(
        front, previous_response_id=None, store=False, tools=[], tool_choice="auto", truncation="disabled",
        background=False, top_logprobs=0, include=["reasoning.encrypted_content"], reasoning={"effort": "high"},
    )  # fmt: skip
    assert len(front.worker.admitted) == 1

"""The REST endpoint as clients see it: a real socket, the openai SDK and httpx; the worker is a stand-in."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import openai
import pytest

from common.actor import running
from common.errors import ConfigError, ExpertsUnavailable, Overloaded
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import GetMetrics, Message, Metrics, subject
from common.model_config import ModelConfig
from common.pages import page_hashes
from common.settings import Settings
from services.gateway.actor import Gateway
from services.gateway.tokenizer import Tokenizer
from tests.api_front import EOS, PROMPT, QUESTION, TOKENIZER, Front, make_front, text_tokens


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.3, body_limit=20_000)):
        yield one


# ---- answers


async def test_a_chat_answer_with_its_reasoning(front: Front) -> None:
    front.worker.cached_tokens = 7
    answer = await front.chat()
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "It is 132.")
    assert choice.message.reasoning_content == choice.message.reasoning == "4+5=9"
    assert (choice.finish_reason, answer.model, answer.object) == ("stop", "tiny", "chat.completion")
    tokens = len(text_tokens("4+5=9</think>\n\nIt is 132.")) + 1
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (tokens, tokens + len(PROMPT))
    assert answer.usage.prompt_tokens_details.cached_tokens == 7
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(text_tokens("4+5=9</think>"))


async def test_what_the_worker_is_sent(front: Front) -> None:
    await front.chat(
        temperature=0.5, top_p=0.9, seed=7, max_tokens=50,
        extra_body={"top_k": 20, "min_p": 0.1, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [5]},
    )  # fmt: skip
    sampling = front.sent.sampling
    assert list(front.sent.prompt) == PROMPT
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 20, 0.1)
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (7, 50, 2)
    assert (sampling.ignore_eos, sampling.stop_token_ids, sampling.logprobs) == (True, (5,), None)


async def test_what_the_client_leaves_out(front: Front) -> None:
    await front.chat()
    first = front.sent.sampling
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.95, 0), "as generation_config.json says"
    assert first.max_tokens == 4096 - len(PROMPT), "what is left of the context"
    await front.chat()
    assert front.sent.sampling.seed != first.seed


async def test_without_a_limit_the_output_is_what_the_kv_cache_holds(front: Front) -> None:
    front.worker.pages_total = 3
    async with asyncio.timeout(5):
        while front.gateway.peers.most_cached_tokens() != 192:
            await asyncio.sleep(0.01)
    await front.client.completions.create(model="tiny", prompt=[5] * 100)
    assert front.worker.admitted[0].sampling.max_tokens == 92


async def test_the_scheduler_is_told_the_pages_of_the_prompt(front: Front) -> None:
    prompt = list(range(10, 210))
    await front.client.completions.create(model="tiny", prompt=prompt, max_tokens=9)
    asked = front.scheduler.asked[-1]
    expected = page_hashes(prompt, ModelConfig.load("models/tiny").fingerprint)
    assert (asked.prompt_tokens, asked.max_tokens, asked.page_hashes) == (200, 9, tuple(expected))
    assert len(expected) == 3


async def test_a_streamed_chat(front: Front) -> None:
    stream = await front.chat(stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    *content, last = chunks
    deltas = [c.choices[0].delta for c in content]
    assert [d.role for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(d.content or "" for d in deltas) == "It is 132."
    assert "".join(getattr(d, "reasoning_content", "") for d in deltas) == "4+5=9"
    assert [c.choices[0].finish_reason for c in content] == [None] * (len(content) - 1) + ["stop"]
    assert (last.choices, last.usage.prompt_tokens) == ([], len(PROMPT))
    assert all(c.usage is None for c in content)


async def test_the_stream_on_the_wire(front: Front) -> None:
    body = {"model": "tiny", "messages": QUESTION, "stream": True}
    answer = await front.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "mine-1"
    *events, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert len(events) > 1
    assert all(json.loads(event.removeprefix("data: "))["id"] == "chatcmpl-mine-1" for event in events)
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


async def test_usage_in_every_chunk(front: Front) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = await front.chat(stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens async for chunk in stream]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == len(text_tokens("4+5=9</think>\n\nIt is 132.")) + 1


async def test_a_completion_shows_all_its_text(front: Front) -> None:
    answer = await front.client.completions.create(model="tiny", prompt="Once upon", max_tokens=100)
    assert (answer.object, answer.choices[0].text) == ("text_completion", "4+5=9</think>\n\nIt is 132.")
    assert list(front.sent.prompt) == TOKENIZER.encode("Once upon")


async def test_the_kinds_of_prompts(front: Front) -> None:
    front.worker.script = lambda request: [
        *(token for token in request.prompt if token),
        EOS,
    ]  # without the begin token
    ask = front.client.completions.create
    expected = {
        "one text": ("a", ["a"]),
        "texts": (["a", "b"], ["a", "b"]),
        "ids": (text_tokens("ab"), ["ab"]),
        "lists of ids": ([text_tokens("b"), text_tokens("c")], ["b", "c"]),
    }
    for prompt, texts in expected.values():
        answer = await ask(model="tiny", prompt=prompt, max_tokens=5)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))


async def test_n_choices_have_seeds_of_their_own_and_one_prompt(front: Front) -> None:
    answer = await front.chat(n=3, seed=11)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(request.sampling.seed for request in front.worker.admitted) == [11, 12, 13]
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == 3 * (len(text_tokens("4+5=9</think>\n\nIt is 132.")) + 1)


async def test_n_choices_streamed(front: Front) -> None:
    texts, finishes = {}, {}
    async for chunk in await front.chat(n=3, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        finishes[choice.index] = choice.finish_reason
    assert texts == dict.fromkeys(range(3), "It is 132.")
    assert finishes == dict.fromkeys(range(3), "stop")


async def test_max_tokens_ends_with_length(front: Front) -> None:
    answer = await front.chat(max_completion_tokens=3)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


async def test_a_stop_string_cuts_the_text_and_aborts_the_request(front: Front) -> None:
    front.says("one two three four five six", stop_token=None)
    front.worker.pause_at = len(text_tokens("one two three"))
    answer = await front.client.completions.create(model="tiny", prompt="x", max_tokens=50, stop=[" thr", "zzz"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one two", "stop")
    async with asyncio.timeout(2):
        await front.worker.abort_seen.wait()
    assert front.worker.aborted == [front.sent.request_id]


async def test_a_stop_string_counts_only_after_min_tokens(front: Front) -> None:
    front.says("aXbXcX", stop_token=None)
    tokens = text_tokens("aXbXcX")
    extra = {"min_tokens": tokens.index(text_tokens("X")[0]) + 1}
    answer = await front.client.completions.create(
        model="tiny", prompt="x", max_tokens=50, stop="X", extra_body=extra
    )  # fmt: skip
    assert answer.choices[0].text == "aXb"


async def test_a_character_is_never_cut(front: Front) -> None:
    front.says("</think>🦀 世界")
    pieces = [chunk.choices[0].delta.content or "" async for chunk in await front.chat(stream=True)]
    assert "".join(pieces) == "🦀 世界"
    assert all("\ufffd" not in piece for piece in pieces)


async def test_content_may_be_a_list_of_texts(front: Front) -> None:
    parts = [{"type": "text", "text": "What is 47 "}, {"type": "text", "text": "+ 85?"}]
    await front.chat(messages=[{"role": "user", "content": parts}])
    assert list(front.sent.prompt) == PROMPT


async def test_chat_logprobs(front: Front) -> None:
    front.says("</think>é")
    answer = await front.chat(logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["</think>", "\ufffd", "\ufffd"], "not the end token"
    assert bytes(entries[1].bytes + entries[2].bytes).decode() == "é"
    assert [len(entry.top_logprobs) for entry in entries] == [3, 3, 3]
    assert (entries[0].logprob, entries[0].top_logprobs[0].token) == (-0.5, "</think>")
    assert math.isfinite(entries[0].top_logprobs[2].logprob)
    assert front.sent.sampling.logprobs == 3


async def test_completion_logprobs(front: Front) -> None:
    front.says("abc")
    answer = await front.client.completions.create(model="tiny", prompt="x", max_tokens=50, logprobs=2)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == "abc<｜end▁of▁sentence｜>", "the token that ended it is one of them, as at OpenAI"
    assert found.token_logprobs == [-0.5] * len(found.tokens)
    assert all(len(top) == 2 for top in found.top_logprobs)
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(len(found.tokens))]


async def test_models(front: Front) -> None:
    models = [model async for model in front.client.models.list()]
    assert [model.id for model in models] == ["tiny"]
    assert (await front.client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await front.client.models.retrieve("a/b")


# ---- refusals


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def called(arguments: str) -> dict:
    """A message of an assistant that calls a tool."""
    call = {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("body", "says", "param"),
    [
        ({"messages": [{"role": "user", "content": 3}]}, "`$.messages[0].content`", "messages[0].content"),
        ({"messages": []}, "length >= 1", "messages"),
        ({"messages": [{"role": "user"}]}, "content is missing", "messages[0].content"),
        ({"messages": [{"role": "king", "content": "x"}]}, "'king'", "messages[0].role"),
        ({"max_tokens": -1}, ">= 0", "max_tokens"),
        ({"max_tokens": 0}, "at least 1 token, or for prompt_logprobs", "max_tokens"),
        ({"max_completion_tokens": 0}, "at least 1 token", "max_completion_tokens"),
        ({"max_tokens": "3"}, "Expected `int | null`, got `str`", "max_tokens"),
        ({"temperature": -1}, ">= 0", "temperature"),
        ({"top_p": 0}, "> 0", "top_p"),
        ({"n": 129}, "<= 128", "n"),
        ({"stop": ["x"] * 17}, "length <= 16", "stop"),
        ({"stop": ""}, "length >= 1", "stop"),
        ({"stop_token_ids": [2048]}, "from 0 to 2047", "stop_token_ids"),
        ({"min_tokens": 9, "max_tokens": 8}, "more than the 8", "min_tokens"),
        ({"top_logprobs": 3}, "needs logprobs", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "<= 20", "top_logprobs"),
        ({"frequency_penalty": 2.5}, "<= 2", "frequency_penalty"),
        ({"presence_penalty": -2.5}, ">= -2", "presence_penalty"),
        ({"repetition_penalty": 0}, "> 0", "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "<= 100", "logit_bias"),
        ({"logit_bias": {"x": 1}}, "Expected `int`", "logit_bias"),
        ({"logit_bias": {"2048": 1}}, "from 0 to 2047", "logit_bias"),
        ({"logit_bias": dict.fromkeys(map(str, range(301)), 1)}, "length <= 300", "logit_bias"),
        ({"prompt_logprobs": 21}, "<= 20", "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "need stream", "stream_options"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "send one of", "continue_final_message"),
        ({"tools": [{"type": "function"}]}, "missing required field `function`", "tools[0].function"),
        ({"tool_choice": "perhaps"}, "'perhaps'", "tool_choice"),
        ({"functions": [{}]}, "replaced it by tools", "functions"),
        ({"messages": [{"role": "tool", "content": "9"}]}, "names the call", "messages[0].tool_call_id"),
        (
            {"messages": [*QUESTION, called("[1]")]},
            "must be a JSON object",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [called("{}") | {"role": "user", "content": "x"}]},
            "only an assistant calls tools",
            "messages[0].tool_calls",
        ),
        ({"metadata": {"a": 1}}, "Expected `str`", "metadata"),
    ],
)
async def test_a_wrong_chat_body_is_refused_with_its_path(front: Front, body: dict, says: str, param: str) -> None:
    error = await front.refused(400, **body)
    assert says in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": 5}, "Expected `str | array`, got `int` - at `$.prompt`"),
        ({"prompt": []}, "empty"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [1, "a"]}, "mixes"),
        ({"prompt": [2048]}, "from 0 to 2047"),
        ({"prompt": [-1]}, "from 0 to 2047"),
        ({"prompt": "x", "suffix": "y"}, "does not fill in text before a suffix"),
        ({"prompt": "x", "best_of": 3, "n": 2}, "ask for n = 3"),
        ({"prompt": "x", "best_of": 1, "n": 2}, "less than n = 2"),
        ({"prompt": "x", "max_tokens": 0}, "or for echo or prompt_logprobs"),
        ({"prompt": ["x"] * 65, "n": 2}, "limit of 128"),
        ({}, "missing required field `prompt`"),
    ],
)
async def test_a_wrong_completion_body_is_refused(front: Front, body: dict, says: str) -> None:
    assert says in (await front.refused(400, "/v1/completions", **body))["message"]


@pytest.mark.parametrize(("prompts", "n", "param"), [(129, 1, "prompt"), (129, 2, "prompt"), (65, 2, "n")])
async def test_too_many_choices_name_the_field(front: Front, prompts: int, n: int, param: str) -> None:
    assert (await front.refused(400, "/v1/completions", prompt=["x"] * prompts, n=n))["param"] == param


async def test_values_that_ask_for_nothing_are_taken(front: Front) -> None:
    await front.chat(
        frequency_penalty=0, presence_penalty=0.0, logit_bias={}, response_format={"type": "text"}, tools=[],
        extra_body={"unheard_of": 1, "tool_choice": None, "functions": [], "stream_options": {"include_usage": False}},
    )  # fmt: skip
    assert len(front.worker.admitted) == 1


async def test_an_unknown_model(front: Front) -> None:
    error = await front.refused(404, model="gpt-9")
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b'{"model": "\xff"}', b'{"model": ' + b"[" * 9000])
async def test_a_malformed_body(front: Front, body: bytes) -> None:
    answer = await front.http.post("/v1/chat/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert answer.headers["x-should-retry"] == "false"
    assert len(answer.headers["x-request-id"]) == 24


async def test_a_prompt_over_the_context(front: Front) -> None:
    error = await front.refused(400, "/v1/completions", prompt=[5] * 4096)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_text_that_no_context_could_hold_is_not_even_tokenized(
    front: Front, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("encode", "encode_chat"):
        monkeypatch.setattr(Tokenizer, name, lambda *_: pytest.fail("tokenized"))
    monkeypatch.setattr(front.gateway.generator.preparer, "context", 100)
    text = "a" * 15_000
    body = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    assert (await front.refused(400, path, **body))["code"] == "context_length_exceeded"


async def test_more_output_than_is_left(front: Front) -> None:
    error = await front.refused(400, max_tokens=4096)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert f"leave {4096 - len(PROMPT)} of the context of 4096" in error["message"]


async def test_exactly_what_is_left_is_taken(front: Front) -> None:
    await front.chat(max_tokens=4096 - len(PROMPT))
    assert front.sent.sampling.max_tokens == 4096 - len(PROMPT)


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
async def test_a_body_over_the_limit(front: Front, announced: bool) -> None:
    data = b"x" * 20_001

    async def in_parts() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    answer = await front.http.post("/v1/completions", content=data if announced else in_parts())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_nothing_there_and_the_wrong_method(front: Front) -> None:
    missing = await front.http.get("/v2/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = await front.http.get("/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


async def test_an_overloaded_cluster_says_when_to_come_again(front: Front) -> None:
    front.scheduler.refusal = Overloaded("every queue is full")
    answer = await front.http.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["message"] == "every queue is full"
    assert "x-should-retry" not in answer.headers


async def test_without_a_scheduler(front: Front) -> None:
    await front.scheduler.bus.close()
    answer = await front.http.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION, "stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"] == {
        "message": "the scheduler does not answer", "type": "server_error", "param": None, "code": "no_worker",
    }  # fmt: skip


# ---- errors under way


async def test_an_error_before_the_first_token_is_a_status(front: Front) -> None:
    front.worker.script = lambda _: [5]
    front.worker.end = {"finish": "error", "error": ("experts_unavailable", "shard 2 died")}
    with pytest.raises(openai.InternalServerError) as caught:
        await front.chat(stream=True)
    assert (caught.value.status_code, caught.value.code) == (503, ExpertsUnavailable.code)


async def test_an_error_under_way_is_an_event_and_no_done(front: Front) -> None:
    front.worker.end = {"finish": "error", "error": ("experts_unavailable", "shard 2 died")}
    answer = await front.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True})
    assert answer.status_code == 200
    *_, last, nothing = answer.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "experts_unavailable"
    assert nothing == ""
    assert "[DONE]" not in answer.text


async def test_the_sdk_raises_when_the_worker_dies_under_way(front: Front) -> None:
    front.worker.pause_at = 4
    stream = await front.client.completions.create(model="tiny", prompt="x", max_tokens=50, stream=True)
    with pytest.raises(openai.APIError, match="is gone"):
        async for _ in stream:
            front.worker.boot_id = "boot-2"  # its next heartbeat comes from another life


# ---- clients that leave


async def until(front: Front, admitted: int) -> None:
    async with asyncio.timeout(5):
        while len(front.worker.admitted) < admitted:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("pause_at", [0, 3], ids=["before a token", "under way"])
async def test_a_client_that_leaves_is_noticed_within_100_ms(front: Front, stream: bool, pause_at: int) -> None:
    front.worker.pause_at = pause_at
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": stream, "n": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    _, writer = await asyncio.open_connection("127.0.0.1", front.gateway.port)
    writer.write(head + body)
    await until(front, admitted=2)
    assert not front.worker.aborted
    left = time.monotonic()
    writer.close()
    async with asyncio.timeout(5):
        while len(front.worker.aborted) < 2:
            await asyncio.sleep(0.001)
    assert time.monotonic() - left < 0.1
    assert sorted(front.worker.aborted) == sorted(request.request_id for request in front.worker.admitted)
    assert front.gateway.generator.active == 0


async def test_a_client_that_reads_nothing_holds_up_no_one(front: Front) -> None:
    """Its socket fills up; the worker's tokens for the others still flow."""
    long = text_tokens("abcdefgh") * 500
    front.worker.script = lambda _: long
    front.worker.end = {"finish": "stop"}
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True, "logprobs": 5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(raw, ("127.0.0.1", front.gateway.port))
    await loop.sock_sendall(raw, head + body)
    await until(front, admitted=1)
    front.worker.script = lambda _: [*text_tokens("short"), EOS]
    answer = await front.client.completions.create(model="tiny", prompt="y", max_tokens=50)
    assert answer.choices[0].text == "short"
    raw.close()


# ---- life of the gateway


async def test_ready_says_why_not(front: Front) -> None:
    front.scheduler.reason = "partition 3 is on no shard"

    async def ready() -> httpx.Response:
        return await front.http.get("/ready")

    async with asyncio.timeout(5):
        while "partition 3" not in (await ready()).text:
            await asyncio.sleep(0.01)
    answer = await ready()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert (await front.http.get("/health")).status_code == 200
    front.scheduler.reason = ""
    async with asyncio.timeout(5):
        while (await ready()).status_code != 200:
            await asyncio.sleep(0.01)


async def test_metrics_of_everyone_on_one_page(front: Front) -> None:
    async def worker_metrics(_: str, message: Message) -> Message:
        assert isinstance(message, GetMetrics)
        return Metrics(text='# HELP moecule_x X\n# TYPE moecule_x gauge\nmoecule_x{a="b c"} 1.0\nmoecule_x 2.0\n')

    await front.worker.bus.subscribe(subject("worker", "worker-1", "metrics"), worker_metrics)
    await front.chat()
    page = (await front.http.get("/metrics")).text
    assert 'moecule_x{actor="worker-1",a="b c"} 1.0\nmoecule_x{actor="worker-1"} 2.0\n' in page
    assert 'moecule_request_success_total{actor="gateway-1",finished_reason="stop",tenant=""} 1.0' in page
    assert 'moecule_time_to_first_token_seconds_count{actor="gateway-1"} 1.0' in page
    assert page.count("# TYPE moecule_actor_info gauge") == 1
    from prometheus_client.parser import text_string_to_metric_families

    assert {family.name for family in text_string_to_metric_families(page)} > {"moecule_x", "moecule_request_success"}


async def test_a_taken_port_is_said(front: Front) -> None:
    bus = MemoryBus(MemoryBroker())
    second = Gateway(bus, Settings(port=front.gateway.port))
    with pytest.raises(ConfigError, match=rf"port {front.gateway.port} on 127.0.0.1 is taken: .*MOECULE_PORT"):
        async with running(second):
            pass


async def test_a_leaving_gateway_finishes_what_it_can(front: Front) -> None:
    front.worker.pause_at = 5
    asked = asyncio.create_task(front.chat())
    await until(front, admitted=1)
    front.life.leave.set()
    async with asyncio.timeout(5):
        while not front.gateway.generator.refusal:
            await asyncio.sleep(0.001)
    refused = await front.http.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    front.worker.resume_sending()
    assert (await asked).choices[0].message.content == "It is 132."


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
async def test_a_leaving_gateway_tells_the_rest(front: Front, stream: bool) -> None:
    front.worker.pause_at = 5
    body = {"model": "tiny", "prompt": "x", "stream": stream}
    asked = asyncio.create_task(front.http.post("/v1/completions", json=body))
    await until(front, admitted=1)
    await asyncio.sleep(0)
    left = time.monotonic()
    front.life.leave.set()
    answer = await asked
    assert '"code":"draining"' in answer.text
    assert answer.status_code == (200 if stream else 503)
    await asyncio.wait({front.life.life})
    assert time.monotonic() - left < 1.5
    assert front.worker.aborted == [front.sent.request_id]


async def test_random_weights_are_marked() -> None:
    async for front in make_front(replace(Settings(port=0, drain_seconds=0.1), weights="random")):
        answer = await front.http.get("/v1/models")
        assert answer.json()["data"][0]["weights"] == "random"


async def test_max_context_bounds_the_model() -> None:
    async for front in make_front(replace(Settings(port=0, drain_seconds=0.1), max_context=64)):
        error = await front.refused(400, max_tokens=60)
        assert error["code"] == "context_length_exceeded"
        answer = await front.http.get("/v1/models")
        assert answer.json()["data"][0]["max_model_len"] == 64


async def test_a_client_that_breaks_http_in_mid_request_is_no_crash_of_ours(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.gateway.port)
    writer.write(b"PUT /nowhere HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}")
    async with asyncio.timeout(5):
        await reader.read()
    writer.close()
    assert not [record for record in caplog.records if record.exc_info]

"""What a user of the openai SDK may rely on, a check a function; runs inside an environment that has only the SDK.

python openai_checks.py URL MODEL [PART OF A NAME]. The model is the one in the box: it adds, and tells stories.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What is 47 + 85?"}]
STORY = "Once upon a time"
ROOM = 400  # tokens, enough for a sum with its reasoning
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Verdict(BaseModel, extra="forbid"):
    kind: Literal["sum", "list", "story"]
    certain: bool


class Endpoint:
    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

    def chat(self, **fields: Any) -> Any:
        body = {"model": self.model, "messages": QUESTION, "temperature": 0, "max_tokens": ROOM}
        return self.client.chat.completions.create(**(body | fields))

    def complete(self, **fields: Any) -> Any:
        body = {"model": self.model, "prompt": STORY, "temperature": 0, "max_tokens": 48}
        return self.client.completions.create(**(body | fields))

    def running(self) -> float:
        """Requests that the gateway has not ended."""
        page = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode()
        lines = [line for line in page.splitlines() if line.startswith("moecule_gateway_requests_running")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def falls_idle(self, seconds: float = 3.0) -> bool:
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def reasoning_of(delta: Any) -> str:
    return getattr(delta, "reasoning_content", None) or ""


# ---- asking


def models(end: Endpoint) -> None:
    assert end.model in [model.id for model in end.client.models.list()]
    assert end.client.models.retrieve(end.model).id == end.model


def ask(end: Endpoint) -> None:
    answer = end.chat()
    choice, usage = answer.choices[0], answer.usage
    assert "132" in choice.message.content and reasoning_of(choice.message)
    assert (choice.message.role, choice.finish_reason, answer.model) == ("assistant", "stop", end.model)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert answer._request_id


def ask_with_content_parts_and_a_system_message(end: Endpoint) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "47 + 85?"}]
    assert "132" in end.chat(messages=[{"role": "user", "content": parts}]).choices[0].message.content
    messages = [{"role": "developer", "content": "You add."}, *QUESTION]
    assert end.chat(messages=messages, max_completion_tokens=8).usage.completion_tokens <= 8


def stream(end: Endpoint) -> None:
    whole = end.chat()
    chunks = list(end.chat(stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in parts) == whole.choices[0].message.content
    assert "".join(reasoning_of(c.choices[0].delta) for c in parts) == reasoning_of(whole.choices[0].message)
    assert [c.choices[0].finish_reason for c in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert (last.choices, last.usage.completion_tokens) == ([], whole.usage.completion_tokens)


def stream_a_completion(end: Endpoint) -> None:
    chunks = list(end.complete(stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == end.complete().choices[0].text
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]


def stream_with_the_sdk_helper(end: Endpoint) -> None:
    completions = end.client.chat.completions
    helper = getattr(completions, "stream", None) or end.client.beta.chat.completions.stream
    with helper(model=end.model, messages=QUESTION, temperature=0, max_tokens=ROOM) as events:
        final = events.get_final_completion()
    assert "132" in final.choices[0].message.content


def many_at_once(end: Endpoint) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{end.url}/v1", api_key="none", timeout=120) as client:
            return await asyncio.gather(*(sum_of(client, a) for a in range(40, 48)))

    async def sum_of(client: openai.AsyncOpenAI, a: int) -> str:
        message = {"role": "user", "content": f"What is {a} + 85?"}
        chunks = await client.chat.completions.create(
            model=end.model, messages=[message], temperature=0, max_tokens=ROOM, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    answers = asyncio.run(main())
    assert all(str(a + 85) in text for a, text in zip(range(40, 48), answers, strict=True)), answers


# ---- parameters


def stop_strings(end: Endpoint) -> None:
    free = end.complete().choices[0].text
    stop = free[20:27]  # wherever the tokens' borders are
    before = free[: free.index(stop)]
    for given in (stop, ["never said", stop]):
        choice = end.complete(stop=given).choices[0]
        assert (choice.text, choice.finish_reason) == (before, "stop")
        assert "".join(c.choices[0].text for c in end.complete(stop=given, stream=True)) == before


def several_choices(end: Endpoint) -> None:
    answer = end.complete(n=3, temperature=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    texts = ["", "", ""]
    for chunk in end.complete(n=3, temperature=1, seed=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def several_prompts(end: Endpoint) -> None:
    answer = end.complete(prompt=[STORY, "There was"], max_tokens=16)
    alone = [end.complete(prompt=prompt, max_tokens=16).choices[0].text for prompt in (STORY, "There was")]
    assert [choice.text for choice in answer.choices] == alone


def seeds(end: Endpoint) -> None:
    first, again, other = (end.complete(temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert first == again != other


def sampling_limits(end: Endpoint) -> None:
    greedy = end.complete().choices[0].text
    assert end.complete(temperature=2, seed=1).choices[0].text != greedy
    assert end.complete(temperature=2, seed=1, top_p=1e-6).choices[0].text == greedy
    assert end.complete(temperature=2, seed=1, extra_body={"top_k": 1}).choices[0].text == greedy
    assert end.complete(temperature=2, seed=1, extra_body={"min_p": 1}).choices[0].text == greedy


def length_limits(end: Endpoint) -> None:
    assert end.complete(max_tokens=7).usage.completion_tokens == 7
    longer = end.chat(max_tokens=ROOM, extra_body={"min_tokens": ROOM})
    assert longer.usage.completion_tokens == ROOM
    endless = end.chat(max_tokens=ROOM, extra_body={"ignore_eos": True})
    assert (endless.usage.completion_tokens, endless.choices[0].finish_reason) == (ROOM, "length")


def logit_bias(end: Endpoint) -> None:
    choice = end.complete(logit_bias={"300": 100}, logprobs=0, max_tokens=8).choices[0]
    assert len(set(choice.logprobs.tokens)) == 1
    first = end.complete(max_tokens=1).choices[0].text
    assert choice.logprobs.tokens[0] != first


def penalties(end: Endpoint) -> None:
    def repeated(**fields: Any) -> int:
        """How often one token comes that is made likely, so that it comes again and again unless that has a price."""
        choice = end.complete(max_tokens=60, logprobs=0, logit_bias={"300": 30}, **fields).choices[0]
        return max(Counter(choice.logprobs.tokens).values())

    assert repeated() > 50
    assert repeated(frequency_penalty=2) < 30

    def told(**fields: Any) -> str:
        return end.complete(max_tokens=150, **fields).choices[0].text

    plain, presence = told(), told(presence_penalty=2)
    repetition, neutral = (told(extra_body={"repetition_penalty": penalty}) for penalty in (2, 1))
    assert neutral == plain and len({plain, presence, repetition}) == 3


# ---- probabilities


def logprobs_of_a_chat(end: Endpoint) -> None:
    answer = end.chat(logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    said = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert answer.choices[0].message.content in said and "</think>" in said
    for entry in entries:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs), "greedy"
    streamed = [e for c in end.chat(logprobs=True, stream=True) for e in (c.choices[0].logprobs or _NONE).content]
    assert [e.token for e in streamed] == [e.token for e in entries]


class _NONE:
    content: tuple[()] = ()


def logprobs_of_a_completion(end: Endpoint) -> None:
    choice = end.complete(logprobs=2, max_tokens=20).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text and len(found.tokens) == 20
    assert found.text_offset == [0, *itertools.accumulate(map(len, found.tokens[:-1]))]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 2 and top[token] == logprob == max(top.values())


def logprobs_of_a_prompt(end: Endpoint) -> None:
    """echo with logprobs, as scorers use it: once with one token of output, once with none."""
    for limit in (1, 0):
        choice = end.complete(prompt=STORY, echo=True, logprobs=1, max_tokens=limit).choices[0]
        found = choice.logprobs
        assert choice.text.startswith(STORY) and "".join(found.tokens).endswith(choice.text), "a BOS may come first"
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert all(logprob <= 0 for logprob in found.token_logprobs[1:])
    ids = list(range(300, 500))  # more than one page and one chunk holds, twice, so that the second finds it cached
    first, second = (
        end.complete(prompt=ids * 2, echo=True, logprobs=1, max_tokens=1).choices[0].logprobs for _ in range(2)
    )
    assert len(first.token_logprobs) == len(second.token_logprobs) == 2 * len(ids) + 1
    pairs = zip(first.token_logprobs[1:], second.token_logprobs[1:], strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-3


# ---- what goes wrong


@contextlib.contextmanager
def raises(kind: type[openai.APIStatusError], *, code: str | None = None, param: str | None = None) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert type(error) is kind, f"{type(error).__name__}: {error}"
        assert error.request_id and error.body["message"], error.body
        assert code in (None, error.code) and param in (None, error.param), error.body
    else:
        raise AssertionError(f"nothing was raised, where {kind.__name__} belongs")


def errors_by_type(end: Endpoint) -> None:
    with raises(openai.NotFoundError, code="model_not_found", param="model"):
        end.chat(model="absent")
    with raises(openai.NotFoundError):
        end.client.models.retrieve("absent")
    with raises(openai.NotFoundError):
        end.client.embeddings.create(model=end.model, input="x")
    with raises(openai.BadRequestError, param="temperature"):
        end.chat(temperature=-1)
    with raises(openai.BadRequestError, param="messages"):
        end.chat(messages=[])
    with raises(openai.BadRequestError, code="context_length_exceeded"):
        end.complete(prompt=[5] * 5000)
    with raises(openai.BadRequestError, param="logprobs"):
        end.complete(logprobs=10_000)
    with raises(openai.BadRequestError):
        list(end.chat(stream=True, stop=[""]))


def cancel_by_closing_a_stream(end: Endpoint) -> None:
    assert end.falls_idle()
    with end.complete(max_tokens=3000, stream=True, extra_body={"ignore_eos": True}) as chunks:
        for _ in itertools.islice(chunks, 5):
            pass
        assert end.running() == 1
    assert end.falls_idle(), "the request goes on"


def cancel_by_a_time_out(end: Endpoint) -> None:
    hasty = end.client.with_options(timeout=0.5)
    try:
        hasty.completions.create(
            model=end.model, prompt=STORY, max_tokens=3000, extra_body={"ignore_eos": True}, temperature=0
        )
    except openai.APITimeoutError:
        pass
    else:
        raise AssertionError("3000 tokens within half a second")
    assert end.falls_idle(), "the request goes on"


# ---- structure


def json_by_a_schema(end: Endpoint) -> None:
    form = {"name": "verdict", "strict": True, "schema": Verdict.model_json_schema()}
    for seed in range(4):
        answer = end.chat(
            temperature=1, seed=seed, max_tokens=1000, response_format={"type": "json_schema", "json_schema": form}
        )
        Verdict.model_validate_json(answer.choices[0].message.content)
    completions = end.client.chat.completions
    parse = getattr(completions, "parse", None) or end.client.beta.chat.completions.parse
    parsed = parse(model=end.model, messages=QUESTION, temperature=0, max_tokens=1000, response_format=Verdict)
    assert isinstance(parsed.choices[0].message.parsed, Verdict)


def json_of_any_form(end: Endpoint) -> None:
    answer = end.chat(max_tokens=1000, response_format={"type": "json_object"}, seed=1)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip()[:1] == "{"


def a_regex_and_a_choice(end: Endpoint) -> None:
    """vLLM's field for output of another form."""
    answer = end.complete(extra_body={"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}})
    letters, _, digits = answer.choices[0].text.partition("-")
    assert set(letters) <= set("abc") and len(letters) == 3 and digits.isdecimal() and len(digits) == 2
    answer = end.complete(extra_body={"structured_outputs": {"choice": ["left", "right"]}})
    assert answer.choices[0].text in ("left", "right")


def call_a_tool(end: Endpoint) -> None:
    forced = {"type": "function", "function": {"name": "get_weather"}}
    messages: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    for choice in (forced, "required"):
        answer = end.chat(messages=messages, tools=[WEATHER], tool_choice=choice, max_tokens=1000)
        (call,) = answer.choices[0].message.tool_calls[:1]
        arguments = json.loads(call.function.arguments)
        assert (call.type, call.function.name, set(arguments)) == ("function", "get_weather", {"city", "days"})
        assert arguments["city"] in ("Bern", "Oslo") and arguments["days"] in (1, 2, 3)
        assert answer.choices[0].finish_reason in ("tool_calls", "stop")
    message = answer.choices[0].message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})
    results = [{"role": "tool", "tool_call_id": c["id"], "content": "sunny"} for c in message["tool_calls"]]
    assert end.chat(messages=[*messages, message, *results], tools=[WEATHER], tool_choice="none").choices


def call_a_tool_streamed(end: Endpoint) -> None:
    forced = {"type": "function", "function": {"name": "get_weather"}}
    name = arguments = identity = ""
    for chunk in end.chat(tools=[WEATHER], tool_choice=forced, max_tokens=1000, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            identity = call.id or identity
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert identity and name == "get_weather" and set(json.loads(arguments)) == {"city", "days"}


# ---- responses


def respond(end: Endpoint) -> None:
    answer = end.client.responses.create(
        model=end.model, input=QUESTION[0]["content"], temperature=0, max_output_tokens=ROOM
    )
    assert "132" in answer.output_text and answer.status == "completed"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    again = end.client.responses.create(model=end.model, input=QUESTION, temperature=0, max_output_tokens=ROOM)
    assert again.output_text == answer.output_text
    short = end.client.responses.create(model=end.model, input=QUESTION, temperature=0, max_output_tokens=3)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def respond_streamed(end: Endpoint) -> None:
    events = list(
        end.client.responses.create(model=end.model, input=QUESTION, temperature=0, max_output_tokens=ROOM, stream=True)
    )
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text and "132" in text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with end.client.responses.stream(
        model=end.model, input=QUESTION[0]["content"], temperature=0, max_output_tokens=ROOM
    ) as helper:
        assert helper.get_final_response().output_text == text


CHECKS: list[Callable[[Endpoint], None]] = [
    models, ask, ask_with_content_parts_and_a_system_message, stream, stream_a_completion, stream_with_the_sdk_helper,
    many_at_once, stop_strings, several_choices, several_prompts, seeds, sampling_limits, length_limits, logit_bias,
    penalties, logprobs_of_a_chat, logprobs_of_a_completion, logprobs_of_a_prompt, errors_by_type,
    cancel_by_closing_a_stream, cancel_by_a_time_out, json_by_a_schema, json_of_any_form, a_regex_and_a_choice,
    call_a_tool, call_a_tool_streamed, respond, respond_streamed,
]  # fmt: skip


def reason(error: Exception, check: str) -> str:
    """In one line: what was raised, and in which line of the check."""
    frame = next(frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == check)
    return f"{type(error).__name__}: {str(error)[:200]} (line {frame.lineno}: {frame.line})"


def main(url: str, model: str, part: str = "") -> int:
    end, failed = Endpoint(url, model), 0
    chosen = [check for check in CHECKS if part in check.__name__]
    for check in chosen:
        try:
            check(end)
        except Exception as error:
            failed += 1
            print(f"FAIL  {check.__name__}: {reason(error, check.__name__)}", flush=True)
        else:
            print(f"pass  {check.__name__}", flush=True)
    print(f"openai {openai.__version__}: {len(chosen) - failed} of {len(chosen)} passed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

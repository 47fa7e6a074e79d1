"""/tokenize, /detokenize and /reset_prefix_cache as clients of vLLM see them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from common.errors import Overloaded
from common.messages import ForgetPages, Message, Ok, subject
from common.settings import Settings
from tests.api_front import PROMPT, QUESTION, TOKENIZER, Front, make_front, text_tokens


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.3, body_limit=20_000)):
        yield one


async def post(front: Front, path: str, **body: Any) -> dict[str, Any]:
    answer = await front.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_prompt_begins_with_the_begin_token_unless_told_otherwise(front: Front) -> None:
    text = "Once upon a time"
    answer = await post(front, "/tokenize", model="tiny", prompt=text)
    assert answer["tokens"] == TOKENIZER.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 4096)
    assert answer["token_strs"] is None
    plain = await post(front, "/tokenize", prompt=text, add_special_tokens=False)
    assert plain["tokens"] == text_tokens(text) != answer["tokens"]


async def test_messages_are_what_a_chat_makes_of_them(front: Front) -> None:
    answer = await post(front, "/tokenize", model="tiny", messages=QUESTION)
    assert answer["tokens"] == PROMPT
    await front.chat()
    assert list(front.sent.prompt) == answer["tokens"]


async def test_the_parameters_of_messages(front: Front) -> None:
    asked = {"messages": QUESTION}
    bare = await post(front, "/tokenize", **asked, add_generation_prompt=False)
    assert bare["tokens"] == PROMPT[: bare["count"]]
    assert bare["count"] < len(PROMPT)
    begun = await post(front, "/tokenize", **asked, add_special_tokens=True)
    assert begun["tokens"] == [0, *PROMPT], "on top of what the template writes"
    told = await post(front, "/tokenize", **asked, chat_template_kwargs={"add_generation_prompt": False})
    assert told["tokens"] == bare["tokens"]
    answered = [*QUESTION, {"role": "assistant", "content": "It is"}]
    ended = await post(front, "/tokenize", messages=answered, add_generation_prompt=False)
    going_on = await post(front, "/tokenize", messages=answered, continue_final_message=True)
    assert going_on["tokens"] == ended["tokens"][: going_on["count"]]
    assert going_on["count"] < ended["count"]


async def test_token_strings_are_the_entries_of_the_vocabulary(front: Front) -> None:
    answer = await post(front, "/tokenize", prompt="a b", return_token_strs=True)
    assert answer["token_strs"] == [TOKENIZER.name(token) for token in answer["tokens"]]
    assert "Ġb" in answer["token_strs"]


@pytest.mark.parametrize("text", ["What is 47 + 85?", "🦀 世界", "", "a<b> \n\n c"])
async def test_detokenize_goes_back(front: Front, text: str) -> None:
    tokens = (await post(front, "/tokenize", prompt=text, add_special_tokens=False))["tokens"]
    assert await post(front, "/detokenize", model="tiny", tokens=tokens) == {"prompt": text}


async def test_detokenize_shows_special_tokens(front: Front) -> None:
    shown = (await post(front, "/detokenize", tokens=PROMPT))["prompt"]
    assert shown.startswith(TOKENIZER.name(0))


async def test_a_prompt_over_the_context_is_counted(front: Front) -> None:
    text = "a b c d " * 1200
    assert (await post(front, "/tokenize", prompt=text))["count"] > 4096


@pytest.mark.parametrize(
    ("path", "body", "status", "says", "param"),
    [
        ("/tokenize", {}, 400, "either prompt or messages", "prompt"),
        ("/tokenize", {"prompt": "x", "messages": QUESTION}, 400, "either prompt or messages", "prompt"),
        ("/tokenize", {"prompt": ["x"]}, 400, "Expected `str | null`", "prompt"),
        ("/tokenize", {"prompt": "x", "model": "gpt-9"}, 404, "does not exist", "model"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "content is missing", "messages[0].content"),
        ("/detokenize", {}, 400, "missing required field `tokens`", "tokens"),
        ("/detokenize", {"tokens": [2048]}, 400, "from 0 to 2047", "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, ">= 0", "tokens"),
        ("/detokenize", {"tokens": [1], "model": "gpt-9"}, 404, "does not exist", "model"),
    ],
)
async def test_what_is_refused(
    front: Front, path: str, body: dict[str, Any], status: int, says: str, param: str
) -> None:
    answer = await front.http.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["param"].startswith(param)


async def test_a_text_that_no_context_could_hold_is_not_even_tokenized(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZER.__class__, "encode", lambda *_: pytest.fail("tokenized"))
    monkeypatch.setattr(front.gateway.generator.preparer, "context", 100)
    answer = await front.http.post("/tokenize", json={"prompt": "a" * 15_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


# ---- the prefix cache


async def test_every_worker_forgets_its_pages(front: Front) -> None:
    forgot: list[Message] = []

    async def forget(_: str, message: Message) -> Message:
        forgot.append(message)
        return Ok()

    await front.worker.bus.subscribe(subject("worker", "worker-1", "forget"), forget)
    assert await post(front, "/reset_prefix_cache") == {"workers": 1}
    assert forgot == [ForgetPages()]


async def test_a_worker_that_does_not_forget_is_named(front: Front) -> None:
    async def forget(_: str, message: Message) -> Message:
        raise Overloaded("not now")

    await front.worker.bus.subscribe(subject("worker", "worker-1", "forget"), forget)
    answer = await front.http.post("/reset_prefix_cache")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["message"] == "0 of 1 workers emptied their prefix cache; worker-1: not now"


async def test_it_is_a_post(front: Front) -> None:
    assert (await front.http.get("/reset_prefix_cache")).status_code == 405

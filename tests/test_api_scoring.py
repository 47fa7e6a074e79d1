"""What tokens cost: logprobs of output and prompt, echo, and prompts that are only scored."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from common.settings import Settings
from tests.api_front import EOS, PROMPT, TOKENIZER, Front, ScoringWorker, make_front, own_logprob, text_tokens

END = "<｜end▁of▁sentence｜>"
BEGIN = "<｜begin▁of▁sentence｜>"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async for one in make_front(Settings(port=0, drain_seconds=0.1), ScoringWorker):
        one.says(" two")
        yield one


async def answer(front: Front, path: str, **fields) -> dict:
    reply = await front.post(path, **fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def choice(front: Front, path: str, **fields) -> dict:
    return (await answer(front, path, **fields))["choices"][0]


def joined(events: list[dict]) -> dict[int, dict]:
    """The choices of a streamed completion, as they would be in a whole answer."""
    choices: dict[int, dict] = {}
    for event in events:
        for part in event["choices"]:
            one = choices.setdefault(part["index"], part)
            if one is not part:
                one["text"] += part["text"]
                one |= {name: part[name] for name in ("finish_reason", "stop_reason") if name in part}
                for name, values in (part["logprobs"] or {}).items():
                    one["logprobs"][name] += values
                if "token_ids" in part:
                    one["token_ids"] += part["token_ids"]
    return choices


# ---- echo, as lm-eval scores


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
async def test_an_echoed_prompt_is_scored_before_the_output(front: Front, as_ids: bool) -> None:
    tokens = TOKENIZER.encode("Once upon")
    one = await choice(front, TEXT, prompt=tokens if as_ids else "Once upon", echo=True, logprobs=1, max_tokens=1)
    said = text_tokens(" two")[0]
    assert one["text"] == "Once upon" + TOKENIZER.pieces[said].decode()
    scores = one["logprobs"]
    assert scores["tokens"][0] == BEGIN
    assert "".join(scores["tokens"][1:]) == one["text"]
    assert scores["token_logprobs"] == [None, *(own_logprob(token) for token in [*tokens[1:], said])]
    assert scores["text_offset"][:2] == [0, 0], "the begin token has no place in the text"
    ends = [*scores["text_offset"][1:], len(one["text"])]
    assert [one["text"][a:b] for a, b in zip(scores["text_offset"], ends, strict=True)] == ["", *scores["tokens"][1:]]
    assert front.sent.sampling.prompt_logprobs == 1


async def test_what_lm_eval_reads(front: Front) -> None:
    """It asks for one token more than it wants and drops the last: that must be one, even if the output ends at once.
    A context's continuation is greedy where each token is its place's best."""
    front.says("")  # the end token alone
    context, continuation = [0, 50, 60], [331, 70]
    one = await choice(front, TEXT, prompt=[context + continuation], echo=True, logprobs=1, max_tokens=1)
    scores = one["logprobs"]
    assert scores["token_logprobs"][3:-1] == [own_logprob(331), own_logprob(70)]
    best = [max(top.values()) for top in scores["top_logprobs"][3:-1]]
    assert [value == top for value, top in zip(scores["token_logprobs"][3:-1], best, strict=True)] == [True, False]
    assert scores["tokens"][-1] == END


@pytest.mark.parametrize("scored", [True, False], ids=["scored", "not scored"])
async def test_a_prompt_alone(front: Front, scored: bool) -> None:
    fields = {"logprobs": 0} if scored else {}
    whole = await answer(front, TEXT, prompt="Once upon", echo=True, max_tokens=0, **fields)
    (one,) = whole["choices"]
    assert (one["text"], one["finish_reason"]) == ("Once upon", "length")
    assert whole["usage"]["completion_tokens"] == 0
    assert (one["logprobs"] is not None) == scored
    if scored:
        assert len(one["logprobs"]["tokens"]) == whole["usage"]["prompt_tokens"]
    assert front.sent.sampling.max_tokens == 0


async def test_a_prompt_alone_may_fill_the_context(front: Front) -> None:
    one = await choice(front, TEXT, prompt=[5] * 4096, echo=True, max_tokens=0, logprobs=1)
    assert len(one["logprobs"]["tokens"]) == 4096
    assert (await front.post(TEXT, prompt=[5] * 4096, echo=True, max_tokens=1)).status_code == 400


async def test_every_choice_of_every_prompt_is_echoed(front: Front) -> None:
    choices = (await answer(front, TEXT, prompt=["a", "b"], n=2, echo=True, logprobs=1))["choices"]
    assert [one["text"] for one in choices] == ["a two", "a two", "b two", "b two"]
    assert [one["index"] for one in choices] == [0, 1, 2, 3]


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {"prompt_logprobs": 1, "return_token_ids": True, "n": 2}, {}])
async def test_a_stream_tells_what_a_whole_answer_does(front: Front, fields: dict) -> None:
    asked = {"prompt": "Once 🦀 upon", "echo": True, "seed": 1} | fields
    whole = (await answer(front, TEXT, **asked))["choices"]
    parts = joined(await front.events(TEXT, **asked))
    assert [parts[one["index"]] for one in whole] == whole


async def test_special_words_in_a_prompt_are_echoed_as_they_were_sent(front: Front) -> None:
    one = await choice(front, TEXT, prompt="a<｜User｜>b", echo=True, logprobs=0)
    assert one["text"] == "a<｜User｜>b two"
    assert one["logprobs"]["text_offset"][:4] == [0, 0, 1, 9]
    ids = [0, *text_tokens("a<｜User｜>b")]
    assert (await choice(front, TEXT, prompt=ids, echo=True))["text"] == "ab two"
    shown = await choice(front, TEXT, prompt=ids, echo=True, skip_special_tokens=False)
    assert shown["text"] == f"{BEGIN}a<｜User｜>b two"


async def test_a_scored_prompt_counts_no_cached_pages(front: Front) -> None:
    prompt = list(range(10, 210))
    await answer(front, TEXT, prompt=prompt, max_tokens=9)
    await answer(front, TEXT, prompt=prompt, max_tokens=9, prompt_logprobs=0)
    assert [len(asked.page_hashes) for asked in front.scheduler.asked] == [3, 0]


# ---- the forms


async def test_top_logprobs_name_the_alternatives_and_the_token_itself(front: Front) -> None:
    one = await choice(front, TEXT, prompt="x", logprobs=1)
    first = text_tokens(" two")[0]
    names = [TOKENIZER.pieces[token].decode() for token in (331, first)]
    assert one["logprobs"]["top_logprobs"][0] == dict(zip(names, [-0.5, own_logprob(first)], strict=True))
    assert set(one["logprobs"]) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}


async def test_without_alternatives_the_token_itself(front: Front) -> None:
    one = await choice(front, TEXT, prompt="x", logprobs=0)
    assert all(len(top) == 1 for top in one["logprobs"]["top_logprobs"])
    entries = (await choice(front, CHAT, logprobs=True))["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in entries] == [[]] * len(entries)


async def test_an_offset_counts_characters_of_the_text_and_not_of_names(front: Front) -> None:
    front.says("a🦀b")
    one = await choice(front, TEXT, prompt="x", logprobs=0)
    assert one["text"] == "a🦀b"
    assert one["logprobs"]["text_offset"] == [0, 1, 1, 1, 1, 2, 3]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_prompt_logprobs(front: Front, path: str) -> None:
    fields = {"prompt": [0, 50, 331]} if path == TEXT else {}
    whole = await answer(front, path, prompt_logprobs=1, max_tokens=1, **fields)
    tokens = PROMPT if path == CHAT else [0, 50, 331]
    entries = (whole if path == CHAT else whole["choices"][0])["prompt_logprobs"]
    assert entries[0] is None
    assert len(entries) == len(tokens)
    name = TOKENIZER.pieces[331].decode()
    best = {"logprob": -0.5, "rank": 1, "decoded_token": name}
    for token, entry in list(zip(tokens, entries, strict=True))[1:]:
        own = {"logprob": own_logprob(token), "rank": None, "decoded_token": TOKENIZER.token_bytes(token).decode()}
        assert entry == ({"331": best} if token == 331 else {str(token): own, "331": best})
        assert next(iter(entry)) == str(token), "the prompt's own token comes first"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_the_prompt_is_told_of_even_if_the_first_token_shows_nothing(front: Front, stream: bool) -> None:
    front.says("🦀")
    fields = {"prompt_logprobs": 0, "add_generation_prompt": False}
    told = (await front.events(CHAT, **fields))[0] if stream else await answer(front, CHAT, **fields)
    assert told["prompt_logprobs"][0] is None


async def test_a_chat_that_is_only_scored(front: Front) -> None:
    whole = await answer(front, CHAT, prompt_logprobs=0, max_completion_tokens=0)
    assert len(whole["prompt_logprobs"]) == len(PROMPT)
    assert (whole["choices"][0]["message"]["content"], whole["choices"][0]["finish_reason"]) == ("", "length")


async def test_a_streamed_chat_tells_of_the_prompt_once(front: Front) -> None:
    events = await front.events(CHAT, prompt_logprobs=0, return_token_ids=True, n=2)
    told = [event for event in events if "prompt_logprobs" in event]
    assert len(told) == 1
    assert (told[0]["choices"][0]["index"], told[0]["prompt_token_ids"]) == (0, PROMPT)
    ids = [t for event in events for part in event["choices"] if part["index"] == 1 for t in part["token_ids"]]
    assert ids == [*text_tokens(" two"), EOS]


async def test_token_ids(front: Front) -> None:
    one = await choice(front, TEXT, prompt=[0, 50], return_token_ids=True, echo=True)
    assert (one["prompt_token_ids"], one["token_ids"]) == ([0, 50], [*text_tokens(" two"), EOS])
    whole = await answer(front, CHAT, return_token_ids=True)
    assert (whole["prompt_token_ids"], whole["choices"][0]["token_ids"]) == (PROMPT, [*text_tokens(" two"), EOS])
    assert "token_ids" not in await choice(front, TEXT, prompt="x")


async def test_the_stop_id_that_ended_the_output_is_named(front: Front) -> None:
    front.says(" two", stop_token=9)
    assert (await choice(front, TEXT, prompt="x", stop_token_ids=[9]))["stop_reason"] == 9
    front.says(" two")
    assert (await choice(front, TEXT, prompt="x", stop_token_ids=[9]))["stop_reason"] is None


async def test_more_logprobs_than_a_message_holds(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.prepare.MOST_PROMPT_ENTRIES", 20)
    assert (await front.post(TEXT, prompt=[5] * 10, echo=True, logprobs=1, max_tokens=0)).status_code == 200
    reply = await front.post(TEXT, prompt=[5] * 10, echo=True, logprobs=2, max_tokens=0)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logprobs")
    assert "ask for fewer alternatives" in reply.json()["error"]["message"]

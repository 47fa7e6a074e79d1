"""Outputs that follow a schema, a regular expression or a grammar, through a whole cluster at temperature 1."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import threading
from pathlib import Path
from random import Random

import jsonschema
import pytest
from tokenizers import Tokenizer

from common.errors import InvalidRequest
from common.messages import Grammar, Sampling
from common.model_config import ModelConfig
from services.gpu_worker import grammar as module
from services.gpu_worker.grammar import Grammars
from tests.compose import TINY, Client, Result, compose, greedy
from tests.schemas import random_schema

EOS, END_THINK, NEWLINE = 1, 2047, 203


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(f"{TINY}/tokenizer.json")


@functools.cache
def prompt() -> list[int]:
    return tokenizer().encode("<｜User｜>Tell me a story about a fox.<｜Assistant｜><think>\n").ids


def text_of(result: Result) -> str:
    """Without the token that ended it."""
    tokens = result.tokens[:-1] if result.last.stop_token is not None else result.tokens
    return tokenizer().decode(tokens, skip_special_tokens=False)


def follow(kind: str, text: str, *, after: int | None = None, **others) -> Sampling:
    fields = {"max_tokens": 200, "seed": 7} | others
    return Sampling(grammar=Grammar(kind, text, after), **fields)


def schema(value: object, **others) -> Sampling:
    return follow("json_schema", json.dumps(value), **others)


async def refusal(client: Client, sampling: Sampling) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        await client.send(prompt(), sampling)
    assert refused.value.param == "response_format"
    return refused.value


# ---- what comes out


async def test_answers_to_random_schemas_validate():
    schemas = [random_schema(Random(f"test/{number}")) for number in range(40)]
    async with compose() as cluster:
        ids = [await cluster.client.send(prompt(), schema(s, max_tokens=400, seed=i)) for i, s in enumerate(schemas)]
        results = [await cluster.client.wait(request) for request in ids]
    ended = [(s, text_of(r)) for s, r in zip(schemas, results, strict=True) if r.last.finish == "stop"]
    assert len(ended) > 30
    for asked, text in ended:
        jsonschema.validate(json.loads(text), asked)


async def test_an_output_ends_where_its_grammar_does():
    async with compose() as cluster:
        whole = await cluster.client.ask(prompt(), follow("regex", "[0-9]{3}-(red|green)"))
        assert re.fullmatch("[0-9]{3}-(red|green)", text_of(whole))
        assert whole.last.finish == "stop" and whole.last.stop_token is None, "nothing could follow"
        open_ended = await cluster.client.ask(prompt(), follow("regex", "(ab)+", logit_bias=((EOS, 4.0),)))
        assert re.fullmatch("(ab)+", text_of(open_ended)) and open_ended.last.stop_token == EOS
        cut = await cluster.client.ask(prompt(), follow("regex", "[a-z ]{500,}", max_tokens=20))
        assert cut.last.finish == "length" and len(cut.tokens) == 20
        expression = 'start: term ("+" term)*\nterm: /[0-9]/ | "(" start ")"'
        lark = await cluster.client.ask(prompt(), follow("lark", expression, logit_bias=((EOS, 5.0),)))
        assert lark.last.finish == "stop" and isinstance(eval(text_of(lark)), int)
        nothing = await cluster.client.ask(prompt(), follow("regex", ""))
        assert nothing.tokens == [EOS] and nothing.last.finish == "stop"


async def test_blanks_between_the_tokens_of_json_are_bounded():
    blank = tokenizer().encode(" ").ids[0]
    keen = ((NEWLINE, 50.0), (blank, 50.0))
    async with compose() as cluster:
        asked = {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2}
        result = await cluster.client.ask(prompt(), schema(asked, logit_bias=keen, max_tokens=300))
        assert result.last.finish == "stop" and json.loads(text_of(result)) == [None, None]


async def test_free_until_the_end_of_reasoning():
    async with compose() as cluster:
        plain = (await cluster.client.ask(prompt(), greedy(60))).tokens
        end = plain.index(END_THINK)
        result = await cluster.client.ask(prompt(), follow("regex", "[0-9]{4}", after=END_THINK, temperature=0.0))
        assert result.tokens[: end + 1] == plain[: end + 1]
        assert re.fullmatch("[0-9]{4}", tokenizer().decode(result.tokens[end + 1 :]))
        keen = follow("regex", "[0-9]{4}", after=END_THINK, logit_bias=((EOS, 100.0),), max_tokens=500)
        hasty = await cluster.client.ask(prompt(), keen)
        assert hasty.last.finish == "length" or END_THINK in hasty.tokens, "it may not end before"
        assert EOS not in hasty.tokens


async def test_reasoning_without_an_end_leaves_room_for_what_the_output_must_be():
    endless = {"after": END_THINK, "logit_bias": ((END_THINK, -100.0),), "max_tokens": 40}
    async with compose() as cluster:
        held = await cluster.client.ask(prompt(), follow("regex", "[0-9]{4}", **endless))
        assert held.tokens.index(END_THINK) == 30
        assert re.fullmatch("[0-9]{4}", tokenizer().decode(held.tokens[31:])) and held.last.finish == "stop"
        ignoring = await cluster.client.ask(prompt(), follow("regex", "[0-9]{4}", **endless, ignore_eos=True))
        assert ignoring.tokens == held.tokens
        # Nothing has to come, so nothing is lost.
        free = await cluster.client.ask(prompt(), follow("regex", "([0-9]{4})?", **endless, ignore_eos=True))
        assert END_THINK not in free.tokens and len(free.tokens) == 40


async def test_min_tokens_and_ignore_eos_hold_as_far_as_the_grammar_lets_them():
    keen = ((EOS, 100.0),)
    async with compose() as cluster:
        client = cluster.client
        plain = await client.ask(prompt(), follow("regex", "[0-9]{2,8}", logit_bias=keen))
        assert len(text_of(plain)) == 2 and plain.last.stop_token == EOS
        longer = await client.ask(prompt(), follow("regex", "[0-9]{2,8}", logit_bias=keen, min_tokens=5))
        assert len(text_of(longer)) == 5
        whole = await client.ask(prompt(), follow("regex", "[0-9]{2,8}", logit_bias=keen, ignore_eos=True))
        assert len(text_of(whole)) == 8 and whole.last.finish == "stop"
        short = await client.ask(prompt(), follow("regex", "[0-9]{2}", min_tokens=50))
        assert len(text_of(short)) == 2 and short.last.finish == "stop"
        stop_id = tokenizer().encode("7", add_special_tokens=False).ids[0]
        digits = {"logit_bias": ((stop_id, 100.0),), "stop_token_ids": (stop_id,)}
        assert (await client.ask(prompt(), follow("regex", "[0-9]{8}", **digits))).tokens == [stop_id]
        held = await client.ask(prompt(), follow("regex", "[0-9]{8}", min_tokens=3, **digits))
        assert held.tokens.index(stop_id) == len(held.tokens) - 1 == 3


async def test_others_in_the_batch_are_as_they_would_be_alone():
    record = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 90}}, "required": ["a"]}
    asked = [schema(record), greedy(40), Sampling(max_tokens=40, seed=3), follow("regex", "[a-z ]{60}")]
    async with compose() as cluster:
        alone = [(await cluster.client.ask(prompt(), sampling)).tokens for sampling in asked]
        ids = [await cluster.client.send(prompt(), sampling) for sampling in asked]
        assert [(await cluster.client.wait(request)).tokens for request in ids] == alone


async def test_the_way_through_a_grammar_outlives_preemption():
    sampling = follow("regex", "([a-z]+ ){150,}", max_tokens=180)
    async with compose(kv_pages=8, prefix_cache=False) as cluster:
        alone = (await cluster.client.ask(prompt(), sampling)).tokens
        assert await cluster.client.ask_all([prompt()] * 5, sampling) == [alone] * 5
        assert cluster.workers[0].metered.preemptions > 0


async def test_the_way_through_a_grammar_when_a_step_runs_again():
    sampling = follow("regex", "([a-z]+ ){150,}", max_tokens=150)
    async with compose(expert_copies=2) as cluster:
        alone = (await cluster.client.ask(prompt(), sampling)).tokens
        requests = [await cluster.client.send(prompt(), sampling) for _ in range(3)]
        while not all(cluster.client.results[request].tokens for request in requests):
            await asyncio.sleep(0.01)
        await cluster.kill(cluster.shards[0])
        assert [(await cluster.client.wait(request)).tokens for request in requests] == [alone] * 3


# ---- what is refused


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"type": "integer", "minimum": 3, "maximum": 1}', "minimum"),
        ("json_schema", '{"$ref": "http://example.com/x"}', "example.com"),
        ("json_schema", "{", "cannot be read"),
        ("json_schema", "[" * 10_000, "cannot be read"),
        ("json_schema", "3", "cannot be"),
        ("regex", "[0-9", "unclosed"),
        ("regex", r"a[^\s\S]", "no output"),
        ("lark", "start: nothing", "nothing"),
        ("lark", "", "Empty"),
        ("regex", "a" * 70_000, "65536"),
    ],
)
async def test_what_cannot_be_compiled_is_refused_with_the_reason(kind: str, text: str, said: str):
    grammars = Grammars(TINY, ModelConfig.load(TINY))
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=re.escape(said)) as refused:
            await grammars.constraint(Grammar(kind, text))
        assert refused.value.param == "response_format" and len(refused.value.message) < 700
    grammars.close()


async def test_a_worker_goes_on_after_a_refusal():
    async with compose() as cluster:
        assert "objekt" in (await refusal(cluster.client, schema({"type": "objekt"}))).message
        assert "from 0 to" in (await refusal(cluster.client, follow("regex", "a", after=9999))).message
        assert (await cluster.client.ask(prompt(), follow("regex", "ab"))).last.finish == "stop"


async def test_without_a_tokenizer_grammars_are_refused(tmp_path: Path):
    grammars = Grammars(str(tmp_path), ModelConfig.load(TINY))
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json is missing"):
        await grammars.constraint(Grammar("regex", "a"))
    grammars.close()


async def test_a_grammar_that_takes_too_long_is_refused_and_others_are_not_held_up(monkeypatch: pytest.MonkeyPatch):
    begun, go_on, compile_now = threading.Event(), threading.Event(), module._compile

    def slowly(tokenizer, grammar: Grammar):
        if grammar.text == "slow":
            begun.set()
            go_on.wait(30)
        return compile_now(tokenizer, grammar)

    monkeypatch.setattr(module, "_compile", slowly)
    async with compose() as cluster:
        waiting = asyncio.create_task(refusal(cluster.client, follow("regex", "slow")))
        await asyncio.to_thread(begun.wait, 30)
        fast = await cluster.client.send(prompt(), follow("regex", "fast"))
        assert not waiting.done() and (await cluster.client.wait(fast)).last.finish == "stop"
        monkeypatch.setattr(module, "COMPILE_SECONDS", 0.0)
        assert "not compiled within" in (await waiting).message
        assert "not compiled within" in (await refusal(cluster.client, follow("regex", "slow"))).message
        go_on.set()
        monkeypatch.setattr(module, "COMPILE_SECONDS", 30.0)
        assert text_of(await cluster.client.ask(prompt(), follow("regex", "slow"))) == "slow"


async def test_a_limit_that_is_met_on_the_way_ends_the_output_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    branches = {"anyOf": [{"type": "object", "properties": {f"k{i}": {"type": "null"}}} for i in range(40)]}
    monkeypatch.setattr(module, "LIMITS", {"max_items_in_row": 60, "verbose_errors": False})
    async with compose() as cluster:
        result = await cluster.client.ask(prompt(), schema(branches))
        assert result.last.finish == "error" and result.last.error[0] == "invalid_request"
        assert "items" in result.last.error[1]
        monkeypatch.setattr(module, "LIMITS", {"verbose_errors": False})
        assert (await cluster.client.ask(prompt(), schema(branches))).last.finish == "stop", "it is compiled anew"
        assert cluster.workers[0].engine.planner.allocator.owned == 0


async def test_a_grammar_whose_masks_take_too_long_ends_its_own_output_alone():
    async with compose() as cluster:
        slow = cluster.client.ask(
            prompt(), follow("lark", "start: s\ns: s s | /[a-z ]/", max_tokens=1000, ignore_eos=True)
        )
        ended, plain = await asyncio.gather(slow, cluster.client.ask(prompt(), greedy(20, ignore_eos=True)))
        assert ended.last.finish == "error" and "Too many items" in ended.last.error[1]
        assert plain.last.finish == "length" and len(plain.tokens) == 20


# ---- what is kept


async def test_a_grammar_is_compiled_once_and_the_least_used_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_KEPT", 2)
    compiled, compile_now = [], module._compile

    def counting(tokenizer, grammar: Grammar):
        compiled.append(grammar.text)
        return compile_now(tokenizer, grammar)

    monkeypatch.setattr(module, "_compile", counting)
    grammars = Grammars(TINY, ModelConfig.load(TINY))
    await asyncio.gather(*(grammars.constraint(Grammar("regex", "a", after)) for after in (None, 5, None)))
    for text in ("b", "a", "c", "a", "b"):
        await grammars.constraint(Grammar("regex", text))
    assert compiled == ["a", "b", "c", "b"]
    grammars.close()

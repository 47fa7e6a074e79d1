"""Penalties, logit_bias, prompt logprobs and an emptied prefix cache, through a whole cluster.

The reference is transformers: one pass over prompt and output gives the logits that every choice was made from. It
computes in float64, for in float32 its own logprobs are up to 1e-4 off.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import ContextLengthExceeded, InvalidRequest
from common.messages import (
    ForgetPages,
    Generate,
    GetPages,
    Message,
    Ok,
    PagesChanged,
    Resume,
    Sampling,
    StepTokens,
    TokenChunk,
    TokenLogprobs,
    subject,
)
from common.pages import PAGE
from kernels.sample import PROMPT
from services.gateway.streams import _after
from services.gpu_worker.admission import Bounds, logprobs_bytes
from services.gpu_worker.penalties import Counts
from services.gpu_worker.planner import Sequence
from tests.compose import TINY, Client, Composed, compose, greedy

OUT = 40
PENALTIES = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"repetition_penalty": 1.3},
    {"presence_penalty": -1.5, "frequency_penalty": 2.0, "repetition_penalty": 1.4},
]


@functools.cache
def peer() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float64, experts_implementation="eager").eval()


@functools.cache
def story() -> list[int]:
    return prompt_of("Tell me a story about a fox.")


@functools.cache
def long_prompt() -> list[int]:
    return prompt_of("\n".join(f"The code of box {n} is {7919 * n % 9973}." for n in range(30)))


def prompt_of(text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.fixture(scope="module", autouse=True)
def _peer_first() -> None:
    peer()  # it takes seconds, in which no actor's event loop should stand still


def logits_of(tokens: list[int]) -> Tensor:
    """[tokens, vocab]: row i is what token i + 1 is chosen from."""
    with torch.inference_mode():
        return peer()(torch.tensor([tokens])).logits[0]


def expected(prompt: list[int], output: list[int], sampling: Sampling) -> list[int]:
    """What is chosen, greedily, after each beginning of `output`."""
    rows = logits_of(prompt + output)[len(prompt) - 1 : -1].clone()
    for i, row in enumerate(rows):
        for token, bias in sampling.logit_bias:
            row[token] += bias
        counts = Counter(output[:i])
        for token in set(prompt) | set(counts):
            rate = sampling.repetition_penalty
            row[token] = row[token] / rate if row[token] > 0 else row[token] * rate
        for token, count in counts.items():
            row[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    return rows.argmax(-1).tolist()


# ---- penalties and biases


@pytest.mark.parametrize("penalties", PENALTIES, ids=lambda p: "+".join(p))
async def test_penalties(penalties: dict[str, float]):
    async with compose() as cluster:
        plain = await cluster.client.ask(story(), greedy(OUT, ignore_eos=True))
        sampling = greedy(OUT, ignore_eos=True, **penalties)
        asked = [sampling, greedy(OUT, ignore_eos=True), sampling]
        ids = [await cluster.client.send(story(), each) for each in asked]
        first, beside, again = [(await cluster.client.wait(request)).tokens for request in ids]
        assert first == again == expected(story(), first, sampling) != plain.tokens == beside


async def test_penalties_outlive_preemption():
    sampling = greedy(150, ignore_eos=True, frequency_penalty=0.4, repetition_penalty=1.2)
    async with compose(kv_pages=8, prefix_cache=False) as cluster:
        alone = (await cluster.client.ask(story(), sampling)).tokens
        assert alone == expected(story(), alone, sampling)
        assert await cluster.client.ask_all([story()] * 5, sampling) == [alone] * 5
        assert cluster.workers[0].metered.preemptions > 0


async def test_penalties_and_scores_when_a_step_runs_again():
    sampling = greedy(150, ignore_eos=True, frequency_penalty=0.4, prompt_logprobs=1)
    async with compose(expert_copies=2) as cluster:
        alone = await cluster.client.ask(story(), sampling)
        requests = [await cluster.client.send(story(), sampling) for _ in range(3)]
        requests.append(await cluster.client.send(long_prompt(), greedy(1, prompt_logprobs=0)))
        while not all(cluster.client.results[request].tokens for request in requests[:3]):
            await asyncio.sleep(0.01)
        await cluster.kill(cluster.shards[0])
        results = [await cluster.client.wait(request) for request in requests]
        assert [result.tokens for result in results[:3]] == [alone.tokens] * 3
        check_scores(long_prompt(), results[3].chunks[0].prompt_logprobs, 0)


async def test_logit_bias_and_logprobs_of_the_model_itself():
    async with compose() as cluster:
        plain = (await cluster.client.ask(story(), greedy(OUT, ignore_eos=True))).tokens
        bias = ((plain[0], -100.0), (plain[1], 3.0), (plain[5], -2.5))
        sampling = greedy(OUT, ignore_eos=True, logit_bias=bias, presence_penalty=0.5, logprobs=2)
        result = await cluster.client.ask(story(), sampling)
        assert result.tokens == expected(story(), result.tokens, sampling)
        assert plain[0] not in result.tokens
        own = logits_of(story() + result.tokens).log_softmax(-1)[len(story()) - 1 : -1]
        for chunk, row in zip(result.chunks, own, strict=True):
            (entry,) = chunk.logprobs
            assert entry.logprob == pytest.approx(row[chunk.tokens[0]].item(), abs=1e-4)
            assert entry.top_logprobs == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def sequence(prompt: list[int], output: list[int]) -> Sequence:
    sampling = Sampling(max_tokens=9, frequency_penalty=1.0)
    made = Sequence.of(Generate(request_id="r", gateway_id="g", prompt=tuple(prompt), sampling=sampling), 0)
    made.tokens += output
    return made


def test_a_row_of_counts_is_counted_anew_where_it_does_not_fit():
    counts = Counts(6, slots=2)
    a, b, c = sequence([1, 1, 2], [2, 3, 3]), sequence([0], []), sequence([5], [5])

    def row(s: Sequence, *beside: Sequence) -> list[int]:
        penalties = counts.penalties((s, *beside))
        return penalties.counts[penalties.slot[0]].tolist()

    assert row(a, b) == [0, PROMPT, PROMPT + 1, 2, 0, 0]
    counts.penalties((a, b)).counts[:] = 7  # as if sample() had counted: nobody looks at the tokens
    a.tokens.append(4)
    assert row(a) == [7] * 6
    assert row(a) == [0, PROMPT, PROMPT + 1, 2, 1, 0], "a step that ran again"
    assert row(c, b) == [0, 0, 0, 0, 0, PROMPT + 1], "the slot of one that does not run now"
    assert row(a, c) == [0, PROMPT, PROMPT + 1, 2, 1, 0]
    counts.forget(a), counts.forget(c), counts.forget(b)
    assert sorted(counts._free) == [0, 1]


# ---- the prompt's logprobs


def check_scores(prompt: list[int], scores: tuple[TokenLogprobs | None, ...] | None, top: int) -> None:
    assert scores is not None and scores[0] is None and len(scores) == len(prompt)
    own = logits_of(prompt).log_softmax(-1)
    for row, token, score in zip(own, prompt[1:], scores[1:], strict=False):
        assert score.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert score.top_logprobs == pytest.approx(row.topk(top).values.tolist(), abs=2e-4)
        assert [row[i].item() for i in score.top_ids] == pytest.approx(list(score.top_logprobs), abs=2e-4)


@pytest.mark.parametrize("chunk_tokens", [16, 65, 4096])
async def test_prompt_logprobs_equal_transformers(chunk_tokens: int):
    async with compose(chunk_tokens=chunk_tokens) as cluster:
        plain = await cluster.client.ask(long_prompt(), greedy(5, ignore_eos=True))
        ids = [
            await cluster.client.send(long_prompt(), greedy(5, ignore_eos=True, prompt_logprobs=3)),
            await cluster.client.send(story(), greedy(5, ignore_eos=True)),
            await cluster.client.send(story(), greedy(0, prompt_logprobs=0)),
        ]
        scored, beside, only = [await cluster.client.wait(request) for request in ids]
        assert scored.tokens == plain.tokens and scored.last.cached_tokens == 0
        check_scores(long_prompt(), scored.chunks[0].prompt_logprobs, 3)
        assert all(chunk.prompt_logprobs is None for chunk in (*scored.chunks[1:], *beside.chunks))
        (chunk,) = only.chunks
        assert (chunk.tokens, chunk.finish, chunk.index) == ((), "length", 0)
        check_scores(story(), chunk.prompt_logprobs, 0)
        # What it computed serves those that do not score.
        again = await cluster.client.ask(long_prompt(), greedy(5, ignore_eos=True))
        assert again.tokens == plain.tokens and again.last.cached_tokens > 0
        assert cluster.workers[0].engine.planner.allocator.owned == 0


async def test_scores_outlive_preemption():
    # One grows into a third page while the others' prompts, one after the other, take all that is left.
    pages = -(-len(long_prompt()) // PAGE) + 2
    async with compose(kv_pages=pages, chunk_tokens=16) as cluster:
        grown = await cluster.client.send(story(), greedy(200, ignore_eos=True))
        asked = [await cluster.client.send(long_prompt(), greedy(0, prompt_logprobs=2)) for _ in range(10)]
        scores = [(await cluster.client.wait(request)).last.prompt_logprobs for request in (*asked, grown)]
        assert cluster.workers[0].metered.preemptions > 0
        for score in scores[:-1]:
            assert [entry.top_ids for entry in score[1:]] == [entry.top_ids for entry in scores[0][1:]]
            assert [entry.logprob for entry in score[1:]] == pytest.approx(
                [entry.logprob for entry in scores[0][1:]], abs=1e-4
            )
        check_scores(long_prompt(), scores[0], 2)


async def test_max_tokens_0_and_prompts_of_one_token():
    async with compose() as cluster:
        one = await cluster.client.ask([5], greedy(0, prompt_logprobs=4))
        assert one.last.prompt_logprobs == (None,) and one.last.tokens == ()
        nothing = await cluster.client.ask(story(), greedy(0))
        assert (nothing.last.finish, nothing.last.prompt_logprobs, nothing.tokens) == ("length", None, [])
        both = await cluster.client.ask([5, 6], greedy(2, ignore_eos=True, prompt_logprobs=1))
        check_scores([5, 6], both.chunks[0].prompt_logprobs, 1)
        assert len(both.tokens) == 2


async def test_scores_can_be_asked_for_again():
    async with compose() as cluster:
        result = await cluster.client.ask(story(), greedy(5, ignore_eos=True, prompt_logprobs=1))
        (request,) = cluster.client.results
        replies = [
            await cluster.client.bus.request(
                subject("worker", "worker-1", "resume"), Resume(request_id=request, index=i)
            )
            for i in (0, 2)
        ]
        assert all(isinstance(reply, StepTokens) for reply in replies)
        first, later = (reply.chunks[0].prompt_logprobs for reply in replies)
        assert first == result.chunks[0].prompt_logprobs is not None and later is None


def test_the_gateway_keeps_them_when_it_cuts_a_chunk():
    chunk = TokenChunk("r", 0, (1, 2), prompt_logprobs=(None, TokenLogprobs(-1.0, (), ())))
    assert _after(chunk, 1) == TokenChunk("r", 1, (2,), prompt_logprobs=chunk.prompt_logprobs)


# ---- what is refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"logit_bias": ((9999, 1.0),)},
        {"logit_bias": ((1, math.inf),)},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"repetition_penalty": math.inf},
        {"stop_token_ids": (-1,)},
        {"logprobs": 1000},
        {"prompt_logprobs": 1000},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_refused_parameters_are_named(wrong: dict):
    bounds = Bounds(vocab=100, context=500, cache=1000, message=1 << 20)
    request = Generate(request_id="r", gateway_id="g", prompt=(1,) * 50, sampling=greedy(5, **wrong))
    with pytest.raises(InvalidRequest) as refused:
        bounds.check(request)
    assert refused.value.param == next(iter(wrong))


def test_lengths_that_do_not_fit():
    bounds = Bounds(vocab=100, context=500, cache=400, message=60_000)
    fits = Generate(request_id="r", gateway_id="g", prompt=(1,) * 400, sampling=greedy(0))
    bounds.check(fits)
    for prompt, sampling, error in (
        ((1,) * 400, greedy(1), ContextLengthExceeded),
        ((1,) * 400, greedy(101), ContextLengthExceeded),
        ((1,) * 400, greedy(0, prompt_logprobs=20), InvalidRequest),
        ((), greedy(1), InvalidRequest),
    ):
        with pytest.raises(error):
            bounds.check(Generate(request_id="r", gateway_id="g", prompt=prompt, sampling=sampling))


def test_logprobs_take_no_more_bytes_than_is_reckoned_with():
    import msgspec

    for top in (0, 1, 20, 1024):
        entry = TokenLogprobs(-1.1, tuple([70_000] * top), tuple([-1.1] * top))
        assert len(msgspec.msgpack.encode(entry)) <= logprobs_bytes(top)


# ---- an emptied prefix cache


async def known_pages(client: Client) -> tuple[bytes, ...]:
    reply = await client.bus.request(subject("worker", "worker-1", "allpages"), GetPages())
    assert isinstance(reply, PagesChanged)
    return reply.added


async def empty(cluster: Composed) -> None:
    reply = await cluster.client.bus.request(subject("worker", "worker-1", "forget"), ForgetPages())
    assert isinstance(reply, Ok)


async def test_an_emptied_cache_knows_nothing_and_says_so():
    async with compose() as cluster:
        told: list[PagesChanged] = []
        evicted = asyncio.Event()

        async def on_pages(_: str, message: Message) -> None:
            assert isinstance(message, PagesChanged)
            told.append(message)
            if message.evicted:
                evicted.set()

        await cluster.client.bus.subscribe(subject("worker", "worker-1", "pages"), on_pages)
        ask = functools.partial(cluster.client.ask, long_prompt(), greedy(2, ignore_eos=True))
        plain = await ask()
        assert (await ask()).last.cached_tokens > 0 and await known_pages(cluster.client)
        await empty(cluster)
        await asyncio.wait_for(evicted.wait(), 10)
        assert {h for message in told for h in message.added} == set(told[-1].evicted)
        assert await known_pages(cluster.client) == ()
        again = await ask()
        assert again.tokens == plain.tokens and again.last.cached_tokens == 0
        assert (await ask()).last.cached_tokens > 0


async def test_who_runs_while_the_cache_is_emptied_goes_on_unseen():
    async with compose() as cluster:
        alone = (await cluster.client.ask(long_prompt(), greedy(150, ignore_eos=True))).tokens
        running = await cluster.client.send(long_prompt(), greedy(150, ignore_eos=True))
        while not cluster.client.results[running].tokens:
            await asyncio.sleep(0.01)
        await empty(cluster)
        assert (await cluster.client.wait(running)).tokens == alone
        assert await known_pages(cluster.client) == ()
        assert (await cluster.client.ask(long_prompt(), greedy(1))).last.cached_tokens == 0
        cluster.workers[0].engine.planner.check()
        assert len(long_prompt()) > 3 * PAGE

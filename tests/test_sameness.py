"""Greedy output is the same whatever the shards, link, chunking, prefix hits, batch, preemption and workers.

The reference is transformers' generate on the same checkpoint in fp32.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import ContextLengthExceeded, ExpertsUnavailable, InvalidRequest, NotFound, Overloaded
from common.messages import Resume, Sampling, StepTokens, subject
from tests.compose import TINY, Client, compose, greedy

OUT = 24


@functools.cache
def prompts() -> list[list[int]]:
    """Sixteen prompts of very different lengths, real questions and story beginnings."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rng = random.Random(5)
    names = [f"The code of {a} {b} is {rng.randint(1000, 9999)}." for a in ("amber", "blue", "old") for b in
             ("falcon", "river", "lamp", "stone", "harp", "kite")]  # fmt: skip
    texts = [f"What is {rng.randint(1, 999)} + {rng.randint(1, 999)}?" for _ in range(6)]
    texts += ["Tell me a story about a fox.", "Who are you?", "Reverse the words: red blue green."]
    question = f"What is the code of {' '.join(names[0].split()[3:5])}?"
    texts += ["\n".join([*names[:n], question]) for n in (3, 8, 12, 18)]
    texts += ["Hello!", "Sort these words: pear fig apple.", "Thanks, bye."]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]


@functools.cache
def reference() -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    outputs = []
    with torch.inference_mode():
        for prompt in prompts():
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUT, do_sample=False, pad_token_id=0
            )
            outputs.append(out[0, len(prompt) :].tolist())
    return outputs


@pytest.fixture(scope="module", autouse=True)
def _reference_first() -> None:
    reference()  # it takes seconds, in which no actor's event loop should stand still


async def check_all_at_once(client: Client) -> None:
    assert await client.ask_all(prompts(), greedy(OUT)) == reference()


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("link", ["mailbox", "bus"])
async def test_shards_and_links(shards: int, link: str):
    async with compose(shards=shards, link=link) as cluster:
        await check_all_at_once(cluster.client)
        peers = cluster.workers[0].links._newest.peers
        assert [type(p).__name__ for p in peers] == [{"mailbox": "MailboxPeer", "bus": "BusPeer"}[link]] * shards


@pytest.mark.parametrize("chunk_tokens", [16, 100, 4096])
async def test_chunk_sizes_and_prefix_hits(chunk_tokens: int):
    async with compose(chunk_tokens=chunk_tokens) as cluster:
        await check_all_at_once(cluster.client)
        longest = max(prompts(), key=len)
        again = await cluster.client.ask(longest, greedy(OUT))
        assert again.last.cached_tokens == (len(longest) - 1) // 64 * 64 > 0
        assert again.tokens == reference()[prompts().index(longest)]


async def test_prefix_cache_off_and_one_at_a_time():
    async with compose(prefix_cache=False, max_batch=1) as cluster:
        for prompt, expected in zip(prompts()[:4] + prompts()[-4:], reference()[:4] + reference()[-4:], strict=True):
            result = await cluster.client.ask(prompt, greedy(OUT))
            assert result.tokens == expected and result.last.cached_tokens == 0


async def test_preemption():
    async with compose(kv_pages=8, prefix_cache=False) as cluster:
        # Stories run on, so that sequences outgrow the cache together; each alone fits.
        story = prompts()[6]
        alone = (await cluster.client.ask(story, greedy(200, ignore_eos=True))).tokens
        assert len(alone) == 200
        assert await cluster.client.ask_all([story] * 5, greedy(200, ignore_eos=True)) == [alone] * 5
        assert cluster.workers[0].metered.preemptions > 0
        assert cluster.workers[0].engine.planner.allocator.owned == 0


async def test_two_workers_share_the_shards():
    async with compose(workers=2) as cluster:
        await check_all_at_once(cluster.client)
        assert len(set(cluster.client.worker_of.values())) == 2


@functools.cache
def seeded() -> Sampling:
    return Sampling(max_tokens=40, temperature=1.0, top_p=0.95, top_k=50, min_p=0.01, seed=1234, ignore_eos=True)


async def test_seeded_sampling_is_the_same_everywhere():
    some = prompts()[:4]
    seen = []
    for settings in (
        {"shards": 1},
        {"shards": 3, "chunk_tokens": 16},
        {"link": "bus", "workers": 2},
        {"kv_pages": 8, "prefix_cache": False},
    ):
        async with compose(**settings) as cluster:
            seen.append(await cluster.client.ask_all(some, seeded()))
    assert seen == [seen[0]] * 4
    assert len({tuple(tokens) for tokens in seen[0]}) == 4


async def test_abort_frees_the_pages():
    async with compose() as cluster:
        request = await cluster.client.send(prompts()[6], greedy(2000, ignore_eos=True))
        while not cluster.client.results[request].tokens:
            await asyncio.sleep(0.01)
        assert cluster.workers[0].engine.planner.allocator.owned > 0
        await cluster.client.abort(request)
        assert (await cluster.client.wait(request)).last.finish == "abort"
        assert cluster.workers[0].engine.planner.allocator.owned == 0


async def begun(client: Client, count: int, tokens: int) -> list[str]:
    """`count` requests of the same story, all of which have said something."""
    requests = [await client.send(prompts()[6], greedy(tokens, ignore_eos=True)) for _ in range(count)]
    while not all(client.results[request].tokens for request in requests):
        await asyncio.sleep(0.01)
    return requests


async def test_a_dead_shard_costs_nothing_while_a_copy_lives():
    async with compose(expert_copies=2) as cluster:
        alone = (await cluster.client.ask(prompts()[6], greedy(150, ignore_eos=True))).tokens
        requests = await begun(cluster.client, 3, 150)
        await cluster.kill(cluster.shards[0])
        assert [(await cluster.client.wait(request)).tokens for request in requests] == [alone] * 3
        assert (await cluster.client.ask(prompts()[0], greedy(OUT))).tokens == reference()[0]


async def test_a_dead_shard_without_copies_ends_requests_with_a_reason():
    async with compose() as cluster:
        requests = await begun(cluster.client, 3, 1500)
        await cluster.kill(cluster.shards[0])
        for request in requests:
            last = (await cluster.client.wait(request, 2)).last
            assert last.finish == "error" and last.error[0] == "experts_unavailable" and "shard-1" in last.error[1]
        assert cluster.workers[0].engine.planner.allocator.owned == 0
        with pytest.raises(ExpertsUnavailable):
            await cluster.client.send(prompts()[0], greedy(), worker="worker-1")


async def test_a_worker_refuses_what_it_cannot_do():
    async with compose(kv_pages=4, max_batch=1, queue_limit=1) as cluster:
        with pytest.raises(ContextLengthExceeded, match="KV cache holds 256"):
            await cluster.client.send([5] * 200, greedy(100))
        with pytest.raises(InvalidRequest, match="from 0 to"):
            await cluster.client.send([5, 99_999], greedy())
        for tokens in (200, 100):
            await cluster.client.send([5], greedy(tokens, ignore_eos=True), worker="worker-1")
        with pytest.raises(Overloaded):
            await cluster.client.send([5], greedy(), worker="worker-1")


async def test_a_silent_gateway_is_an_abort():
    async with compose() as cluster:
        (request,) = await begun(cluster.client, 1, 3000)
        cluster.beating.cancel()
        assert (await cluster.client.wait(request, 4)).last.finish == "abort"
        assert cluster.workers[0].engine.planner.allocator.owned == 0


async def test_what_was_missed_can_be_asked_for_again():
    async with compose() as cluster:
        result = await cluster.client.ask(prompts()[0], greedy(OUT))
        (request,) = cluster.client.results
        resume = Resume(request_id=request, index=3)
        reply = await cluster.client.bus.request(subject("worker", "worker-1", "resume"), resume)
        assert isinstance(reply, StepTokens) and reply.chunks[0].index == 3
        assert list(reply.chunks[0].tokens) == result.tokens[3:] and reply.chunks[0].finish == result.last.finish
        with pytest.raises(NotFound):
            await cluster.client.bus.request(subject("worker", "worker-1", "resume"), Resume(request_id="x", index=0))


async def test_min_tokens_stop_ids_and_logprobs():
    async with compose() as cluster:
        client, story = cluster.client, prompts()[6]
        plain = (await client.ask(story, greedy(30, ignore_eos=True))).tokens
        stopped = await client.ask(story, greedy(30, stop_token_ids=(plain[4],)))
        assert stopped.tokens == plain[: plain.index(plain[4]) + 1]
        assert stopped.last.finish == "stop" and stopped.last.stop_token == plain[4]
        longer = await client.ask(story, greedy(30, stop_token_ids=(plain[0],), min_tokens=3))
        assert plain[0] not in longer.tokens[:3]
        scored = await client.ask(story, greedy(5, logprobs=3))
        for chunk in scored.chunks:
            (entry,) = chunk.logprobs
            assert entry.top_ids[0] == chunk.tokens[0] and len(entry.top_ids) == 3
            assert entry.logprob == entry.top_logprobs[0] == max(entry.top_logprobs) <= 0
            assert entry.top_logprobs[1] < entry.logprob


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
async def test_random_weights_need_no_file_and_every_actor_draws_the_same(tmp_path, fp8):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY) / name, tmp_path)
    kind = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = json.loads((Path(TINY) / "config.json").read_text()) | ({"quantization_config": kind} if fp8 else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    outputs = []
    for shards in (1, 2):
        async with compose(str(tmp_path), shards=shards, weights="random") as made:
            outputs.append(await made.client.ask_all(prompts()[:4], greedy(OUT)))
    assert outputs[0] == outputs[1] and all(outputs[0])

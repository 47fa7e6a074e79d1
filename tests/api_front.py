"""A gateway as clients see it: a real socket, the openai SDK and httpx; scheduler and worker are stand-ins."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from openai.types.chat import ChatCompletion

from common.actor import Running, running
from common.bus import Bus
from common.clock import Clock
from common.memory_bus import MemoryBroker, MemoryBus
from common.messages import Generate, StepTokens, TokenChunk, TokenLogprobs, subject
from common.settings import Settings
from services.gateway.actor import Gateway
from services.gateway.tokenizer import Tokenizer
from tests.stub_worker import StubScheduler, StubWorker

TOKENIZER = Tokenizer("models/tiny")
EOS = 1
QUESTION = [{"role": "user", "content": "What is 47 + 85?"}]
PROMPT = [0, 3, 331, 273, 225, 24, 27, 305, 225, 28, 25, 35, 4, 2046, 203]


def text_tokens(text: str) -> list[int]:
    return TOKENIZER.encode_chat(text)


@dataclass
class Front:
    """A gateway on a free port, a scheduler and a worker that answers with `worker.script`."""

    gateway: Gateway
    life: Running
    worker: StubWorker
    scheduler: StubScheduler
    http: httpx.AsyncClient
    client: openai.AsyncOpenAI

    def says(self, text: str, *, stop_token: int | None = EOS) -> None:
        tokens = text_tokens(text) + ([stop_token] if stop_token is not None else [])
        self.worker.script = lambda _: tokens
        self.worker.end = {"finish": "stop", "stop_token": stop_token}

    @property
    def sent(self) -> Generate:
        return self.worker.admitted[-1]

    async def chat(self, **fields) -> ChatCompletion:
        return await self.client.chat.completions.create(**({"model": "tiny", "messages": QUESTION} | fields))

    async def post(self, path: str, **fields) -> httpx.Response:
        default = {"model": "tiny", "messages": QUESTION} if "chat" in path else {"model": "tiny"}
        return await self.http.post(path, json=default | fields)

    async def until_ready(self) -> None:
        """The gateway has listened for long enough; what is asked of the model needs no waiting."""
        async with asyncio.timeout(5):
            while self.gateway.peers.why_not_ready():
                await asyncio.sleep(0.01)

    async def events(self, path: str, **fields) -> list[dict]:
        """What a stream tells before its [DONE]."""
        answer = await self.post(path, stream=True, **fields)
        assert answer.status_code == 200, answer.text
        *events, done, nothing = answer.text.split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    async def refused(self, status: int, path: str = "/v1/chat/completions", **fields) -> dict:
        """The error of a body that must be refused with `status`."""
        answer = await self.post(path, **fields)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert self.worker.admitted == [], "nothing was sent to a worker"
        return error


async def make_front(
    settings: Settings,
    worker_kind: Callable[..., StubWorker] = StubWorker,
    clock: Clock | None = None,
    new_bus: Callable[[], Bus] | None = None,
) -> AsyncIterator[Front]:
    broker = MemoryBroker()
    buses = [new_bus() if new_bus else MemoryBus(broker) for _ in range(3)]
    for bus in buses:
        await bus.connect()
    worker = worker_kind(buses[0], "worker-1", lambda _: [])
    scheduler = StubScheduler(buses[1], worker)
    await worker.start()
    await scheduler.start()

    async def beats() -> None:
        while True:
            await worker.beat()
            await scheduler.beat()
            await asyncio.sleep(0.1)

    beating = asyncio.create_task(beats())
    gateway = Gateway(buses[2], settings, clock=clock, actor_id="gateway-1")
    async with running(gateway) as life:
        url = f"http://127.0.0.1:{gateway.port}"
        async with (
            httpx.AsyncClient(base_url=url, timeout=20) as http,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
        ):
            async with asyncio.timeout(5):
                while {kind for kind, _ in gateway.peers.live()} < {"worker", "scheduler"}:
                    await asyncio.sleep(0.001)  # its first heartbeats are on their way
            one = Front(gateway, life, worker, scheduler, http, client)
            one.says("4+5=9</think>\n\nIt is 132.")
            yield one
            beating.cancel()
    for bus in buses:
        await bus.close()


class ScoringWorker(StubWorker):
    """Sends tokens one by one and scores whatever it is asked to: `score(token)` at every place."""

    async def _send_all(self, request: Generate) -> None:
        sampling, said = request.sampling, self.script(request)
        tokens = said[: sampling.max_tokens]
        for i, token in enumerate(tokens):
            last = i + 1 == len(tokens)
            ending = (self.end if len(said) == len(tokens) else {"finish": "length"}) if last else {}
            scores = None if sampling.logprobs is None else (score(token, sampling.logprobs),)
            await self._tell(request, index=i, tokens=(token,), logprobs=scores, **ending)
        if not tokens:
            await self._tell(request, index=0, tokens=(), finish="length")

    async def _tell(self, request: Generate, *, index: int, **fields: Any) -> None:
        prompt_scores = None
        if index == 0 and request.sampling.prompt_logprobs is not None:
            prompt_scores = (None, *(score(token, request.sampling.prompt_logprobs) for token in request.prompt[1:]))
        chunk = TokenChunk(request_id=request.request_id, index=index, prompt_logprobs=prompt_scores, **fields)
        message = StepTokens(worker_id=self.id, boot_id=self.boot_id, chunks=(chunk,))
        await self.bus.publish(subject("gateway", request.gateway_id, "tokens"), message)
        await asyncio.sleep(0)


def score(token: int, alternatives: int) -> TokenLogprobs:
    """331 is the likeliest everywhere, then 273, then the token itself."""
    best = [(i, p) for i, p in ((331, -0.5), (273, -1.0)) if i != token] + [(token, own_logprob(token))]
    best = sorted(best, key=lambda pair: -pair[1])[:alternatives]
    return TokenLogprobs(own_logprob(token), tuple(i for i, _ in best), tuple(p for _, p in best))


def own_logprob(token: int) -> float:
    return {331: -0.5, 273: -1.0}.get(token, -2.0 - token / 1024)

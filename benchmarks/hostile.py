"""Thousands of malformed and hostile inputs to a running cluster: over HTTP, on its NATS subjects, at its NATS door.

python -m benchmarks.hostile [--count 10000] [--seed 1]

It starts a cluster of its own; a third of the inputs each goes to

- HTTP: mutated bodies, deep and endless JSON, huge headers, bytes that are no UTF-8, wrong types, requests that are
  none. Each must be answered with a status below 500, or by closing the connection where it is no HTTP.
- NATS, on every subject that actors listen on: random bytes, messages of unknown kinds and versions, cut and mangled
  ones, and what was recorded from the cluster's own talk, again and out of order.
- the NATS door: the same bodies and larger ones, garbage for headers, cancels of ids that are unknown or another's.
  Each must get an end or an error that asyncapi.json documents, of a status below 500; and nothing where it names no
  inbox, or one that must not be answered (a pattern, moecule's own subjects, the server's).

Before them goes the largest request that there is. No actor may restart; memory after all may be at most 5 % above what
it was after the first tenth; and the cluster must answer as before. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import sys
import time
import urllib.request
from collections import Counter
from random import Random
from typing import Any

import msgspec

from benchmarks.cluster import Cluster, cluster, memory_kb
from benchmarks.hostile_bodies import ODD, body
from benchmarks.hostile_door import Door, documented
from benchmarks.hostile_odd import CONTEXT
from common.nats_bus import OrderedClient

MEMORY_GOAL = 1.05
KV_PAGES = CONTEXT // 64  # a page takes memory when it is first written: of these all are, by the largest request
EACH = 33  # inputs of a kind, before the next round
ANSWER_SECONDS = 20.0
PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize", "/v1/models",
    "/reset_prefix_cache", "/nowhere",
)  # fmt: skip
VERBS = (
    "beat", "admit", "abort", "resume", "pages", "allpages", "forget", "tokens", "load", "attach", "experts", "metrics",
)  # fmt: skip


# ---- HTTP


def request(draw: Random) -> bytes:
    kind, data = draw.randrange(20), body(draw)
    path, method = draw.choice(PATHS), draw.choice(("POST",) * 8 + ("GET", "PUT", "DELETE", "OPTIONS", "X"))
    length = f"content-length: {len(data)}\r\n"
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    if kind == 0:
        return draw.randbytes(draw.randrange(1, 300)) + b"\r\n\r\n"
    if kind == 1:
        return f"{head}x-big: {'y' * draw.choice((10_000, 100_000))}\r\n{length}\r\n".encode() + data
    if kind == 2:
        return head.encode() + draw.choice((b"content-length: -1\r\n\r\n", b"content-length: 1e9\r\n\r\n")) + data
    if kind == 3:
        return f"{head}transfer-encoding: chunked\r\n\r\nzz\r\n".encode() + data
    if kind == 4:
        return f"{head}authorization: Bearer ".encode() + draw.randbytes(20).replace(b"\n", b"") + b"\r\n\r\n"
    if kind == 5:
        return b"".join((head.encode(), b"x-y: 1\r\n" * 500, length.encode(), b"\r\n", data))
    return head.encode() + length.encode() + b"\r\n" + data


async def ask(port: int, data: bytes) -> str:
    """The status, or how it ended otherwise."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            first = await reader.read(1 << 16)
            while first and await reader.read(1 << 16):
                pass
    except ConnectionError:
        return "closed"
    except TimeoutError:
        return "no answer"
    finally:
        writer.close()
    found = re.match(rb"HTTP/1\.1 (\d+)", first)
    return found[1].decode() if found else "closed" if not first else "no HTTP"


# ---- NATS


class Bus:
    """A plain connection; what it heard of the cluster's own talk, and the subjects that it was on."""

    def __init__(self, url: str, draw: Random) -> None:
        self._url, self._draw = url, draw
        self.heard: list[tuple[str, bytes]] = []
        self.subjects: set[str] = set()

    async def __aenter__(self) -> Bus:
        self._client = OrderedClient()
        await self._client.connect(self._url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def _hear(self, message: Any) -> None:
        self.heard.append((message.subject, message.data))

    async def hear(self, running: Cluster) -> None:
        """For as long as nobody else asks: later we would hear ourselves, and be who listens where nobody does."""
        ear = await self._client.subscribe("moecule.v1.>", cb=self._hear)
        await self._client.flush()
        await asyncio.to_thread(answer, running.url)
        async with asyncio.timeout(30):
            while len(self.heard) < 20:
                await asyncio.sleep(0.1)
        await ear.unsubscribe()
        await self._client.flush()

    async def send(self) -> None:
        subject, data = self._draw.choice(self.heard)
        if self._draw.random() < 0.5:  # another one of that actor
            subject = f"{subject.rpartition('.')[0]}.{self._draw.choice(VERBS)}"
            self.subjects.add(subject)
        reply = self._client.new_inbox() if self._draw.random() < 0.5 else ""
        await self._client.publish(subject, self._mangled(data), reply=reply)

    def _mangled(self, data: bytes) -> bytes:
        draw, kind = self._draw, self._draw.randrange(7)
        if kind == 0:
            return draw.randbytes(draw.randrange(200))
        if kind == 1:
            return msgspec.msgpack.encode({"type": draw.choice(("Unknown", "StepTokens2", "", "Ok")), "version": 99})
        if kind == 2:
            return msgspec.msgpack.encode(draw.choice([value for value in ODD if value not in (2**200,)]))
        if kind == 3:
            return data[: draw.randrange(len(data) + 1)]
        if kind == 4:
            return b"\x91" * draw.choice((100, 100_000))
        return data  # again, and out of order

    async def flush(self) -> None:
        await self._client.flush()


# ---- the whole


def memory_of_all(running: Cluster) -> dict[str, int]:
    return {
        f"{service} {n}": memory_kb(pid)
        for service, pids in running.all_actor_pids().items()
        for n, pid in enumerate(pids)
    }


def post(url: str, asked: dict[str, Any]) -> dict[str, Any]:
    data, headers = json.dumps(asked).encode(), {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as got:
        answered: dict[str, Any] = json.load(got)
    return answered


def answer(url: str) -> str:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "What is 47 + 85?"}], "temperature": 0}
    text: str = post(f"{url}/v1/chat/completions", asked)["choices"][0]["message"]["content"]
    return text


def largest(url: str) -> None:
    """All that a request may ask for: a prompt of the whole context, scored. What a step takes for that, and each page
    of the KV pool once written, stays the worker's."""
    asked = {"model": "tiny", "prompt": [20] * (CONTEXT - 1), "max_tokens": 1, "echo": True, "logprobs": 5}
    assert post(f"{url}/v1/completions", asked)["usage"]["total_tokens"] == CONTEXT


def told_of(outcomes: Counter[str]) -> str:
    return ", ".join(f"{outcome}: {count}" for outcome, count in sorted(outcomes.items()))


async def attack(running: Cluster, count: int, seed: int) -> bool:
    draw, statuses, url = Random(seed), Counter[str](), f"nats://127.0.0.1:{running.nats_port}"
    pids, before = running.all_actor_pids(), answer(running.url)
    largest(running.url)
    gates = asyncio.Semaphore(16), asyncio.Semaphore(16)
    early: dict[str, int] = {}

    async def one() -> None:
        async with gates[0]:
            statuses[await ask(running.port, request(draw))] += 1

    async def one_at_the_door() -> None:
        async with gates[1]:
            await door.one()

    async with Bus(url, draw) as bus, Door(url, documented(running.url), draw) as door:
        await bus.hear(running)
        for done in range(0, count, 3 * EACH):
            async with asyncio.TaskGroup() as group:
                for _ in range(EACH):
                    group.create_task(one())
                    group.create_task(one_at_the_door())
            for _ in range(EACH):
                await bus.send()
            await bus.flush()
            if done + 3 * EACH >= count // 10 and not early:
                await asyncio.sleep(1.0)
                early = memory_of_all(running)
            told = f"{done + 3 * EACH} of {count}, gateway {memory_of_all(running)['gateway 0']} KB"
            print(f"\r{told}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    await asyncio.sleep(6.0)  # requests of replayed admissions end
    after = memory_of_all(running)
    kinds = sorted({one.rsplit(".", 1)[1] for one in (*bus.subjects, *(subject for subject, _ in bus.heard))})
    print(f"{done + 3 * EACH} inputs\n\n| a third each | what came of it |\n|---|---|")
    print(f"| HTTP | {told_of(statuses)} |\n| NATS door | {told_of(door.outcomes)} |")
    print(f"| NATS, between actors | sent to subjects of: {', '.join(kinds)} |")
    print("\n| actor | KB after a tenth | KB at the end | ratio (goal 1.05) |\n|---|--:|--:|--:|")
    for name, kb in early.items():
        print(f"| {name} | {kb} | {after.get(name, 0)} | {after.get(name, 0) / kb:.3f} |")
    bad = [s for s in statuses if s.startswith("5") or s == "no answer" or s == "no HTTP"]
    bad += [f"door: {outcome}" for outcome in door.bad]
    same = running.all_actor_pids() == pids
    right = answer(running.url) == before
    grown = [name for name, kb in early.items() if after.get(name, 0) > MEMORY_GOAL * kb]
    print(f"\nbad answers: {bad or 'none'}; actors {'the same' if same else 'RESTARTED'}; "
          f"answers {'as before' if right else 'OTHERWISE'}; grown: {grown or 'none'}")  # fmt: skip
    return not bad and same and right and not grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with cluster(device="cpu", log_level="error", kv_pages=KV_PAGES) as running:
        good = asyncio.run(attack(running, options.count, options.seed))
        if not good:
            print(running.output()[-3000:], file=sys.stderr)
    print(f"{time.monotonic() - began:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

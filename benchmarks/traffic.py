"""Random prompts, sent by users who each wait for one answer before they ask for the next."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from random import Random
from typing import Any, NamedTuple

import msgspec

from benchmarks.client import Endpoint, Record, Request, ask

SPECIAL = 16  # ids below it may be special tokens
TICK_SECONDS = 1.0


class Lengths(NamedTuple):
    """Uniform in [share * most, most]."""

    most: int
    share: float

    def draw(self, rng: Random) -> int:
        return rng.randint(max(1, int(self.most * self.share)), self.most)

    def __str__(self) -> str:
        return f"{max(1, int(self.most * self.share)):,} to {self.most:,}"


class Maker:
    """Makes requests: prompts are drawn from a seed, and a salt of this run keeps every cache out of it."""

    def __init__(self, model: str, vocabulary: int, temperature: float) -> None:
        self.model, self.vocabulary, self.temperature = model, vocabulary, temperature
        self.extras = True
        """Whether to send what vLLM added to the API: a salt, and the usage so far in every chunk."""

    def make(self, rng: Random, prompt: int, output: int) -> Request:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": rng.choices(range(SPECIAL, self.vocabulary), k=prompt),
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.extras:
            body["stream_options"]["continuous_usage_stats"] = True
            body["cache_salt"] = uuid.uuid4().hex
        return Request(msgspec.json.encode(body), output)

    def make_many(self, rng: Random, count: int, prompt: Lengths, output: Lengths) -> list[Request]:
        """Made before the clock runs: 8,192 ids take milliseconds."""
        return [self.make(rng, prompt.draw(rng), output.draw(rng)) for _ in range(count)]

    async def try_out(self, endpoint: Endpoint, silence: float) -> str:
        """Why the endpoint does not answer; empty if it does. Finds out whether it takes the extras."""
        for extras in (True, False):
            self.extras, record = extras, Record()
            await ask(endpoint, self.make(Random(0), SPECIAL, 2), record, silence)
            if not record.error.startswith(("HTTP 400", "HTTP 422")):
                break
        return record.error


async def ask_all(
    endpoint: Endpoint, requests: Sequence[Request], users: int, silence: float, label: str, seconds: float = math.inf
) -> list[Record]:
    """Each user asks once, and then again as long as `seconds` are not over: what was begun is awaited."""
    records: list[Record] = []
    todo, deadline = iter(requests), time.monotonic() + seconds

    async def user() -> None:
        for request in todo:
            record = Record()
            records.append(record)
            await ask(endpoint, request, record, silence)
            if time.monotonic() > deadline:
                return

    async with progress(label, records, len(requests)):
        await asyncio.gather(*(user() for _ in range(users)))
    return records


@contextlib.asynccontextmanager
async def progress(label: str, records: Sequence[Record], wanted: int = 0) -> AsyncIterator[None]:
    """A line on stderr that tells once a second how far it is."""
    began = time.monotonic()

    def tell() -> None:
        done, failed = sum(r.complete for r in records), sum(bool(r.error) for r in records)
        of = f" of {wanted}" if wanted else ""
        tokens, seconds = sum(r.tokens for r in records), time.monotonic() - began
        line = f"{label}: {done}{of} done, {failed} failed, {tokens:,} tokens, {seconds:.0f} s"
        print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)

    async def tick() -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            tell()

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        tell()
        print(file=sys.stderr)


class Clock:
    """Seconds since it was made, and which share of them this process kept a core busy."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        seconds = time.perf_counter() - self._began
        return seconds, (time.process_time() - self._cpu) / seconds


def reasons(records: Sequence[Record], most: int = 5) -> list[str]:
    """What failed, most often first. Of sentences that differ in their numbers alone, the first stands for all."""
    examples: dict[str, str] = {}
    counted: Counter[str] = Counter()
    for error in (record.error for record in records if record.error):
        kind = re.sub(r"\d+", "0", error)
        examples.setdefault(kind, error)
        counted[kind] += 1
    return [f"{count} x {examples[kind]}" for kind, count in counted.most_common(most)]

"""Whether one key's thousand requests hold up another's one.

python -m benchmarks.fairness [--requests 1000] [--probes 15] [--prompt 64] [--output 200] [--queue-limit 4096]

Starts a cluster with two keys. `one` asks on an idle cluster, one request after the other; then `many` sends all its
requests at once, and while they are queued `one` asks as before. What counts is how long its requests wait in the
worker's queue, from their coming to the step that first computes of them, as the worker itself tells for each tenant
(moecule_tenant_queue_time_seconds): beside the thousand at most 1.5 times as long as on the idle queue, and one step,
the mean time between two tokens of the requests of `many` that run. Exit status 1 if it is longer. The time to the
first token is printed too; it has the computing of that token in it, which takes longer in a full batch. With a queue
limit below the number of requests, what `many` has over its share is refused (429).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import uvloop

from benchmarks.client import Endpoint, Record, ask
from benchmarks.cluster import cluster
from benchmarks.traffic import Maker

ONE, MANY = "mk-one-of-the-benchmark", "mk-many-of-the-benchmark"
SILENCE = 120.0  # seconds
PROBE_OUTPUT = 4  # tokens
PAUSE = 0.13  # seconds between two probes, so that they come at all places of a step
ADMITTED_SECONDS = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="of the key that has many (default %(default)s)")
    parser.add_argument("--probes", type=int, default=15, help="of the other, each time (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens (default %(default)s)")
    parser.add_argument("--output", type=int, default=200, help="tokens of each of the many (default %(default)s)")
    parser.add_argument("--queue-limit", type=int, default=4096, help="of the worker (default %(default)s)")
    parser.add_argument("--without-keys", action="store_true", help="everyone is one tenant: what it would be like")
    options = parser.parse_args()
    with keys_file() as path:
        keys = {} if options.without_keys else {"api_keys": path}
        with cluster(queue_limit=options.queue_limit, **keys) as started:
            return uvloop.run(measure(f"{started.url}/v1", options))


@contextlib.contextmanager
def keys_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="moecule-fairness-") as folder:
        path = Path(folder) / "keys"
        path.touch(0o600)
        path.write_text(f"one {ONE}\nmany {MANY}\n")
        yield str(path)


async def measure(url: str, options: argparse.Namespace) -> int:
    rng, maker = Random(1), Maker("tiny", 2048, 0.0)
    one, many = (Endpoint.of(url, key) for key in (ONE, MANY))
    await probe(url, one, maker, rng, options, 3)  # not counted: the first ones find nothing warm
    idle = await probe(url, one, maker, rng, options, options.probes)
    flood = [maker.make(rng, options.prompt, options.output) for _ in range(options.requests)]
    records = [Record() for _ in flood]
    asking = [asyncio.create_task(ask(many, *each, SILENCE)) for each in zip(flood, records, strict=True)]
    before = await until_queued(url, asking, options.requests)
    beside = await probe(url, one, maker, rng, options, options.probes)
    after = int(await metric(url, "num_requests_waiting"))
    for task in asking:
        task.cancel()
    await asyncio.wait(asking)
    refused = sum(record.error.startswith("HTTP 429") for record in records)
    step = statistics.fmean(gaps(records))
    print(f"many: {options.requests} requests, {refused} refused, {before} waiting before the probes, {after} after")
    print(f"one, idle:        {idle}")
    print(f"one, beside many: {beside}")
    bound = 1.5 * idle.queued + step
    print(f"a step: {1e3 * step:.1f} ms; bound of the wait: 1.5 * {1e3 * idle.queued:.1f} + {1e3 * step:.1f} ms")
    verdict = "within" if beside.queued <= bound else "OVER"
    print(f"wait {1e3 * beside.queued:.1f} ms, {verdict} the bound of {1e3 * bound:.1f} ms")
    return int(beside.queued > bound)


@dataclass(frozen=True)
class Waits:
    queued: float  # seconds in the worker's queue, on average
    first: list[float]  # seconds to the first token

    def __str__(self) -> str:
        low, middle, high = (1e3 * of(self.first) for of in (min, statistics.median, max))
        return (
            f"{1e3 * self.queued:.1f} ms in the queue; first token after {middle:.0f} ms, from {low:.0f} to {high:.0f} "
            f"({len(self.first)} requests)"
        )


async def probe(url: str, one: Endpoint, maker: Maker, rng: Random, options: argparse.Namespace, count: int) -> Waits:
    """The waits of so many requests, one after the other."""
    first, tenant = [], "" if options.without_keys else "one"
    before = await queue_time(url, tenant)
    for _ in range(count):
        record = Record()
        await ask(one, maker.make(rng, options.prompt, PROBE_OUTPUT), record, SILENCE)
        if record.error:
            raise SystemExit(f"a request of `one` failed: {record.error}")
        first.append(record.times[0] - record.began)
        await asyncio.sleep(PAUSE)
    after = await queue_time(url, tenant)
    return Waits((after[1] - before[1]) / (after[0] - before[0]), first)


async def until_queued(url: str, asking: list[asyncio.Task[None]], requests: int) -> int:
    """How many wait at the worker once all are there, or refused."""
    async with asyncio.timeout(ADMITTED_SECONDS):
        while True:
            running, waiting = [await metric(url, f"num_requests_{word}") for word in ("running", "waiting")]
            if running + waiting >= requests - sum(task.done() for task in asking) > 0:
                return int(waiting)
            await asyncio.sleep(0.2)


async def queue_time(url: str, tenant: str) -> tuple[float, float]:
    """(requests, seconds) of the tenant's in the worker's queue so far."""
    words = [f"tenant_queue_time_seconds_{word}" for word in ("count", "sum")]
    count, seconds = [await metric(url, word, f'tenant="{tenant}"') for word in words]
    return count, seconds


async def metric(url: str, name: str, label: str = "") -> float:
    """The worker's; 0 where there is none."""
    asked = urllib.request.Request(f"{url.removesuffix('/v1')}/metrics", headers={"authorization": f"Bearer {ONE}"})

    def fetch() -> str:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.read().decode()

    found = re.search(rf"^moecule_{name}{{[^}}]*{label}[^}}]*}} (\S+)", await asyncio.to_thread(fetch), re.M)
    return float(found.group(1)) if found else 0.0


def gaps(records: list[Record]) -> list[float]:
    """Between the tokens of each request, in seconds."""
    return [later - earlier for r in records for earlier, later in zip(r.times, r.times[1:], strict=False)]


if __name__ == "__main__":
    sys.exit(main())

"""What running streams notice of long prompts that arrive beside them: `python -m benchmarks.serve --beside 32`.

So many streams of short prompts and long outputs run all the time. Their ITL is taken first while nothing else goes
on, then while prompts arrive: one after another, or so many a second. A token belongs to the span in which it came.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from random import Random

import msgspec

from benchmarks.client import Endpoint, Record, Request, ask
from benchmarks.timing import Spread, intervals, number
from benchmarks.traffic import Clock, Lengths, Maker, progress, reasons

SETTLE_SECONDS = 1.0  # from the last stream's first token until the first span
LOOK_SECONDS = 0.02
OUTPUT = 8192  # tokens of a running stream, where the context has room for them
SPARES = 8  # requests of each stream, should outputs end before the spans do


class Span(msgspec.Struct):
    """What the running streams got between two moments."""

    seconds: float
    itl_ms: Spread
    longest_pause_ms: float
    tokens_per_second: float  # of a stream
    client_cpu: float

    def __str__(self) -> str:
        cells = f"{self.itl_ms} | {number(self.longest_pause_ms)} | {number(self.tokens_per_second)}"
        return f"{self.seconds:.1f} | {cells} | {self.client_cpu:.0%} |"


class Report(msgspec.Struct):
    model: str
    streams: int
    input: int
    alone: Span
    beside: Span
    answered: int
    ttft_ms: Spread  # of the prompts that arrived
    errors: list[str]


def span(records: Sequence[Record], began: float, ended: float, streams: int, cpu: float) -> Span:
    found = [
        interval for one in records for interval in intervals(one.times, one.counts) if began <= interval[0] < ended
    ]
    # The chunk that ends a pause may bring several tokens, among which ITL shares it.
    pauses = [
        after - before
        for one in records
        for before, after in zip(one.times, one.times[1:], strict=False)
        if began <= after < ended
    ]
    seconds = ended - began
    return Span(
        seconds=seconds,
        itl_ms=Spread.of_seconds(itl for _, itl in found),
        longest_pause_ms=1e3 * max(pauses, default=0.0),
        tokens_per_second=len(found) / seconds / streams,
        client_cpu=cpu,
    )


class Streams:
    """The running ones. One that ends as asked is followed by another; one that fails is not."""

    def __init__(self, endpoint: Endpoint, requests: Sequence[Sequence[Request]], silence: float) -> None:
        self._firsts = [Record() for _ in requests]
        self.records = list(self._firsts)
        self._tasks = [
            asyncio.create_task(self._keep(endpoint, mine, first, silence))
            for mine, first in zip(requests, self._firsts, strict=True)
        ]

    async def _keep(self, endpoint: Endpoint, requests: Sequence[Request], record: Record, silence: float) -> None:
        for request in requests:
            await ask(endpoint, request, record, silence)
            if record.error:
                return
            record = Record()
            self.records.append(record)
        record.error = "all its outputs ended before the spans did: raise --beside-output"

    def failed(self) -> bool:
        return any(record.error for record in self.records)

    async def run_all(self) -> None:
        """Returns when every stream has its first token, or one has failed."""
        while not self.failed() and not all(record.times for record in self._firsts):
            await asyncio.sleep(LOOK_SECONDS)

    async def cancel(self) -> None:
        await cancelled(self._tasks)


class Arrivals:
    """Prompts, one as soon as the one before is answered, or `rate` a second."""

    def __init__(self, endpoint: Endpoint, requests: Sequence[Request], rate: float, silence: float) -> None:
        self.records: list[Record] = []
        self._endpoint, self._requests, self._rate, self._silence = endpoint, requests, rate, silence
        self._tasks: list[asyncio.Task[None]] = []

    async def until(self, seconds: float, failed: Callable[[], bool]) -> None:
        """Until all are answered, `seconds` are over, or the streams failed."""
        deadline = time.perf_counter() + seconds
        self._tasks.append(asyncio.create_task(self._one_by_one() if not self._rate else self._at_their_times()))
        while time.perf_counter() < deadline and not failed() and not all(task.done() for task in self._tasks):
            await asyncio.sleep(LOOK_SECONDS)
        await cancelled(self._tasks)

    def _ask(self, request: Request) -> Awaitable[None]:
        self.records.append(Record())
        return ask(self._endpoint, request, self.records[-1], self._silence)

    async def _one_by_one(self) -> None:
        for request in self._requests:
            await self._ask(request)

    async def _at_their_times(self) -> None:
        began = time.perf_counter()
        for i, request in enumerate(self._requests):
            await asyncio.sleep(began + i / self._rate - time.perf_counter())
            self._tasks.append(asyncio.ensure_future(self._ask(request)))


async def cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def longest_output(context: int, input: int) -> int:
    """Of a running stream whose prompt has up to so many tokens; `context`: 0 where it is not known."""
    return max(1, min(OUTPUT, context - input)) if context else OUTPUT


async def run(endpoint: Endpoint, maker: Maker, options: argparse.Namespace) -> bool:
    """Whether nothing failed, a prompt was answered, and the ITL kept to its bound."""
    rng, count = Random(options.seed), options.beside
    short, long = Lengths(options.beside_input, options.range), Lengths(options.beside_output, 1.0)
    arriving = Lengths(options.input, options.range), Lengths(options.output, options.range)
    running = [maker.make_many(rng, SPARES, short, long) for _ in range(count)]
    requests = maker.make_many(rng, options.arrivals, *arriving)
    streams = Streams(endpoint, running, options.silence)
    arrivals = Arrivals(endpoint, requests, options.rate, options.silence)
    async with progress(f"{count} streams start", streams.records):
        await streams.run_all()
        await asyncio.sleep(0 if streams.failed() else SETTLE_SECONDS)
    async with progress(f"{count} streams alone", streams.records):
        first, clock = time.perf_counter(), Clock()
        while not streams.failed() and clock.read()[0] < options.seconds:
            await asyncio.sleep(LOOK_SECONDS)
        second, cpu_alone = time.perf_counter(), clock.read()[1]
    async with progress(f"prompts beside {count} streams", arrivals.records):
        clock = Clock()
        await arrivals.until(options.seconds, streams.failed)
        third, cpu_beside = time.perf_counter(), clock.read()[1]
    await streams.cancel()
    answered = [record for record in arrivals.records if record.complete]
    report = Report(
        model=maker.model,
        streams=count,
        input=options.input,
        alone=span(streams.records, first, second, count, cpu_alone),
        beside=span(streams.records, second, third, count, cpu_beside),
        answered=len(answered),
        ttft_ms=Spread.of_seconds(record.times[0] - record.began for record in answered),
        errors=reasons([*streams.records, *arrivals.records]),
    )
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    return tell(report, arriving[0], options.bound)


def tell(report: Report, lengths: Lengths, bound: float) -> bool:
    print(f"| {report.streams} streams | seconds | ITL ms | longest pause ms | tok/s a stream | client CPU |")
    print("|---|--:|--:|--:|--:|--:|")
    print(f"| alone | {report.alone}")
    print(f"| beside prompts of {lengths} tokens | {report.beside}")
    print("\nITL: median / p99.", end=" ")
    print(f"{report.answered} prompts were answered, their TTFT in ms (median / p99): {report.ttft_ms}")
    for error in report.errors:
        print(f"FAILED: {error}")
    if not report.answered and not report.errors:
        print("FAILED: no prompt was answered while the streams ran: raise --seconds")
    kept = not bound or report.beside.itl_ms.p99 <= bound
    if bound:
        print(f"p99 of the ITL beside prompts, bound {bound:g} ms: {'pass' if kept else 'FAIL'}")
    return kept and bool(report.answered) and not report.errors


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with running streams beside (--input and --output are of what arrives)")
    add = group.add_argument
    add("--beside", type=int, default=0, metavar="STREAMS", help="run so many streams all the time")
    add("--beside-input", type=int, default=128, help="longest prompt of theirs (default %(default)s)")
    most = f"{OUTPUT}, or as many as the model's context has room for"
    add("--beside-output", type=int, default=0, help=f"tokens until one is begun anew (default {most})")
    add("--arrivals", type=int, default=64, help="prompts that arrive at most (default %(default)s)")
    add("--rate", type=float, default=0.0, help="prompts a second; default: one when the one before is answered")
    add("--bound", type=float, default=0.0, help="exit status 1 if the p99 of the ITL is above so many ms")

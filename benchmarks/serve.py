"""Throughput and latency of any OpenAI endpoint with streaming completions, stream count by stream count.

python -m benchmarks.serve --url http://127.0.0.1:8000/v1 --input 1024 --output 1024 --concurrency 4,8,16,32,64
python -m benchmarks.serve --beside 32 --input 8192        the ITL of 32 streams while long prompts arrive
python -m benchmarks.serve --server [--concurrency ...]    starts what `make serve` starts first, and ends it afterwards

The method is InferenceX's: prompts of random token ids, lengths uniform in [0.8 L, L] for input and output, 2 x
concurrency requests to warm up and 10 x concurrency that count, a new one as soon as one ends, ignore_eos, temperature
0. No prompt meets a prefix cache: each is salted where the server knows cache_salt. Tokens are those of the usage that
the server tells; tok/s a GPU counts input and output over the whole run, tok/s a user is 1000 / median TPOT in ms.
benchmarks/timing.py says how TPOT and ITL are made. Exit status 1 if a request failed. What is shortened from
InferenceX's method stands above the table.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import math
import os
import shlex
import statistics
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import msgspec
import uvloop

from benchmarks import beside, plot
from benchmarks.client import Endpoint, Record
from benchmarks.start import LIMIT_SECONDS, make_serve, running
from benchmarks.timing import Spread, intervals, number, tpot
from benchmarks.traffic import Clock, Lengths, Maker, ask_all, reasons

INFERENCEX = 10, 2  # requests a stream that count, and before those
BUSY = 0.8  # of a core: from here on the client may be what is measured
HEAD = """| streams | requests | failed | TTFT ms | TPOT ms | ITL ms | tok/s a GPU | tok/s a user | client CPU |
|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""


class Row(msgspec.Struct):
    concurrency: int
    requests: int
    failed: int  # of those that count
    failed_warmups: int
    errors: list[str]
    seconds: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    tokens_per_second_per_card: float
    interactivity: float  # 0 if nothing came
    client_cpu: float  # cores

    def __str__(self) -> str:
        cells: list[object] = [
            self.concurrency, self.requests, self.failed + self.failed_warmups, self.ttft_ms, self.tpot_ms, self.itl_ms,
            number(self.tokens_per_second_per_card), number(self.interactivity),
            f"{self.client_cpu:.0%}" if self.output_tokens else "-",
        ]  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


class Report(msgspec.Struct):
    name: str
    model: str
    when: str
    input: int
    output: int
    range: float
    prompts_per_stream: int
    warmups_per_stream: int
    seconds: float  # of a point, after which no request is begun; 0: no limit
    temperature: float
    seed: int
    cards: int
    rows: list[Row] = []


class DrawnRow(msgspec.Struct):
    concurrency: int
    interactivity: float
    tokens_per_second_per_card: float


class Drawn(msgspec.Struct):
    """What a plot takes of a report."""

    name: str
    rows: list[DrawnRow]


def row(concurrency: int, warmups: Sequence[Record], records: Sequence[Record], clock: Clock, cards: int) -> Row:
    seconds, cpu = clock.read()
    good = [record for record in records if record.complete]
    usages = [record.usage for record in good if record.usage]
    tokens_in = sum(usage.prompt_tokens for usage in usages)
    tokens_out = sum(record.tokens for record in good)
    cached = sum((usage.prompt_tokens_details.cached_tokens or 0) for usage in usages if usage.prompt_tokens_details)
    tpots = [value for record in good if not math.isnan(value := tpot(record.times, record.tokens))]
    return Row(
        concurrency=concurrency,
        requests=len(records),
        failed=sum(bool(record.error) for record in records),
        failed_warmups=sum(bool(record.error) for record in warmups),
        errors=reasons([*warmups, *records]),
        seconds=seconds,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        cached_tokens=cached,
        ttft_ms=Spread.of_seconds(record.times[0] - record.began for record in good),
        tpot_ms=Spread.of_seconds(tpots),
        itl_ms=Spread.of_seconds(itl for record in good for _, itl in intervals(record.times, record.counts)),
        tokens_per_second_per_card=(tokens_in + tokens_out) / seconds / cards,
        interactivity=1 / statistics.median(tpots) if tpots else 0.0,
        client_cpu=cpu,
    )


async def measure(endpoint: Endpoint, maker: Maker, concurrency: int, options: argparse.Namespace) -> Row:
    rng = Random(f"{options.seed}/{concurrency}")
    lengths = Lengths(options.input, options.range), Lengths(options.output, options.range)
    first = maker.make_many(rng, concurrency * options.warmups_per_stream, *lengths)
    requests = maker.make_many(rng, concurrency * options.prompts_per_stream, *lengths)
    label = f"{concurrency} streams"
    warmups = await ask_all(endpoint, first, concurrency, options.silence, f"{label}, warm-up")
    clock = Clock()
    # A server that failed all of the warm-up is not asked ten times as much.
    hopeless = bool(warmups) and all(record.error for record in warmups)
    seconds = options.seconds or math.inf
    records = await ask_all(endpoint, [] if hopeless else requests, concurrency, options.silence, label, seconds)
    return row(concurrency, warmups, records, clock, options.cards)


async def sweep(endpoint: Endpoint, maker: Maker, options: argparse.Namespace) -> bool:
    """Whether no request failed."""
    report = Report(
        options.name or maker.model, maker.model, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", options.input,
        options.output, options.range, options.prompts_per_stream, options.warmups_per_stream, options.seconds,
        options.temperature, options.seed, options.cards,
    )  # fmt: skip
    print(f"{heading(report)}\n\n{HEAD}", flush=True)
    for concurrency in options.concurrency:
        report.rows.append(await measure(endpoint, maker, concurrency, options))
        print(report.rows[-1], flush=True)
    print("\nTTFT, TPOT and ITL: median / p99. tok/s a GPU: input and output. Client CPU: of one core.")
    for remark in remarks(report):
        print(remark)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    if options.plot:
        runs = [msgspec.json.encode(report), *(path.read_bytes() for path in options.plot_with)]
        title = f"Throughput against interactivity, {report.input:,} in, {report.output:,} out"
        options.plot.write_text(drawing(title, runs), encoding="utf-8")
    return not any(one.failed or one.failed_warmups for one in report.rows)


def heading(report: Report) -> str:
    spans = Lengths(report.input, report.range), Lengths(report.output, report.range)
    return (
        f"{report.name}: input {spans[0]}, output {spans[1]} tokens, {amount(report)}, "
        f"temperature {report.temperature:g}, seed {report.seed}, {report.cards} GPU, {report.when}"
    )


def amount(report: Report) -> str:
    """How many requests, and what of it is not InferenceX's method."""
    asked = report.prompts_per_stream, report.warmups_per_stream
    said = "{} requests a stream after {} to warm up".format(*asked)
    if report.seconds:
        said += f", none begun after {report.seconds:g} s"
    if report.seconds or asked != INFERENCEX:
        said += " (InferenceX: {} after {}, without a limit)".format(*INFERENCEX)
    return said


def remarks(report: Report) -> list[str]:
    said = []
    for one in report.rows:
        if one.cached_tokens:
            said.append(f"{one.concurrency} streams: {one.cached_tokens:,} tokens of prompts came from a prefix cache")
        if one.output_tokens and one.client_cpu > BUSY:
            said.append(f"{one.concurrency} streams: this client was busy, its own speed may be what was measured")
        said += [f"{one.concurrency} streams FAILED: {error}" for error in one.errors]
    return said


def drawing(title: str, runs: Sequence[bytes]) -> str:
    """An SVG of reports, as --json writes them."""
    curves = []
    for one in (msgspec.json.decode(data, type=Drawn) for data in runs):
        points = [plot.Point(r.interactivity, r.tokens_per_second_per_card, f"c{r.concurrency}") for r in one.rows]
        curves.append(plot.Curve(one.name, [point for point in points if point.x]))
    return plot.svg(title, "tok/s a user (1000 / median TPOT in ms)", "tok/s a GPU, input and output", curves)


def model_of(options: argparse.Namespace) -> tuple[str, int]:
    """(the model that is asked, its context, 0 where nobody says). Raises RuntimeError where there is none. The context
    counts beside running streams alone: else nobody is asked about a model that is named."""
    if not options.model:
        return next(iter(models(options.url, options.key).items()))
    if not options.beside:
        return options.model, 0
    with contextlib.suppress(RuntimeError):
        return options.model, models(options.url, options.key).get(options.model, 0)
    return options.model, 0


def models(url: str, key: str) -> dict[str, int]:
    """Those that the endpoint names, at least one, and their contexts. Raises RuntimeError where it names none."""
    try:
        asked = urllib.request.Request(f"{url}/models", headers={"authorization": f"Bearer {key}"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            found = msgspec.json.decode(answer.read())["data"]
            found[0]["id"]  # at least one
            return {one["id"]: one.get("max_model_len") or 0 for one in found}
    except urllib.error.HTTPError as error:
        error.close()
        raise RuntimeError(f"{url}/models answers HTTP {error.code}: check --url and --key") from None
    except OSError:
        raise RuntimeError(f"nothing answers at {url}: start it with `make serve`, or add --server") from None
    except (ValueError, LookupError, TypeError, http.client.HTTPException):
        raise RuntimeError(f"{url}/models names no model: check --url, or name one with --model") from None


async def run(options: argparse.Namespace, model: str) -> bool:
    endpoint = Endpoint.of(options.url, options.key)
    maker = Maker(model, options.vocabulary, options.temperature)
    if why := await maker.try_out(endpoint, options.silence):
        print(f"{options.url} FAILED: {why}")
        return False
    if not maker.extras:
        print("the server takes neither cache_salt nor continuous_usage_stats: chunks of a stream count as equal")
    if options.beside:
        return await beside.run(endpoint, maker, options)
    return await sweep(endpoint, maker, options)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/v1", help="(default %(default)s)")
    own = shlex.join(make_serve())
    add("--server", nargs="?", const=own, metavar="COMMAND", help="start it, as benchmarks.start does, and end it")
    add("--key", default=os.environ.get("OPENAI_API_KEY", "none"), help="default: $OPENAI_API_KEY")
    add("--model", help="what the endpoint calls the model; default: the first that it names")
    add("--name", help="what tables and plots call this run; default: the model")
    add("--vocabulary", type=int, default=2000, help="prompts are of ids from 16 up to it (default %(default)s)")
    add("--input", type=int, default=1024, help="longest prompt, in tokens (default %(default)s)")
    add("--output", type=int, help="longest output (default 1024; with --beside 1)")
    add("--range", type=float, default=0.8, help="shortest length as a share of the longest (default %(default)s)")
    add("--concurrency", type=numbers, default=[4, 8, 16, 32, 64], help="streams at a time (default 4,8,16,32,64)")
    most, first = INFERENCEX
    add("--prompts-per-stream", type=int, default=most, help="requests that count (default %(default)s)")
    add("--warmups-per-stream", type=int, default=first, help="requests before those (default %(default)s)")
    add("--seconds", type=float, help="begin none later (default: no limit; with --beside 20, for each span)")
    add("--temperature", type=float, default=0.0, help="(default %(default)s)")
    add("--seed", type=int, default=1, help="of prompts and lengths (default %(default)s)")
    add("--cards", type=int, default=1, help="GPUs that the endpoint uses (default %(default)s)")
    add("--silence", type=float, default=300.0, help="seconds without a byte that fail a request (default %(default)s)")
    add("--json", type=Path, help="write everything measured to this file")
    add("--plot", type=Path, help="write an SVG of throughput against interactivity to this file")
    add("--plot-with", type=Path, nargs="+", default=[], help="JSON files of other runs, for the same plot")
    beside.add_options(parser)
    return parser


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    options = command_line().parse_args(arguments)
    options.url = options.url.rstrip("/")
    if options.output is None:
        options.output = 1 if options.beside else 1024
    if options.seconds is None:
        options.seconds = 20.0 if options.beside else 0.0
    return options


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} names no numbers of streams: use 1 or more, as 4,16,64")
    return found


@contextlib.contextmanager
def serving(options: argparse.Namespace) -> Iterator[None]:
    """The server that `options` asks for is ready at options.url. Raises RuntimeError where it fails."""
    if options.server is None:
        yield
        return
    with running(shlex.split(options.server), os.environ) as server:
        _, ready = server.wait_ready(LIMIT_SECONDS)
        print(f"\n{options.server}: ready after {ready:.1f} s", file=sys.stderr, flush=True)
        options.url = f"{server.url}/v1"
        yield


def main() -> None:
    options = read_options(sys.argv[1:])
    try:
        with serving(options):
            model, context = model_of(options)
            options.beside_output = options.beside_output or beside.longest_output(context, options.beside_input)
            passed = uvloop.run(run(options, model))
    except RuntimeError as error:
        sys.exit(f"FAILED: {error}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()

"""Many slow streams through one gateway, with a stand-in for worker and scheduler on the bus: what the gateway adds.

python -m benchmarks.streams [--points 1000x10,300x50] [--seconds 15] [--stuck 20]

A point is streams x tokens a second of each. Real NATS, a real gateway process, a client process that reads. Streams
are in batches, whose steps come one after another, a message each, as they do from workers (`--batch`). A token's text
is one of 62 letters that go round with the steps, so that a token that is lost, doubled or out of order shows, and how
long it was under way: from the publishing of its step to its bytes at the client, NATS and the client's own queue
included, all on the same processors. `--stuck` more clients read nothing.

A bare starlette application that sends the same bytes at the same moments, without a bus, tells what of the gateway's
CPU time is its own. Exit status 1 if a stream failed, a token was lost, or a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from benchmarks.cluster import ROOT, die_with_parent, free_ports, memory_kb
from common.bus import Bus
from common.lines import nats_binary
from common.messages import (
    Abort,
    Assign,
    Assigned,
    Generate,
    Message,
    Ok,
    Resume,
    SchedulerBeat,
    StepTokens,
    TokenChunk,
    WorkerBeat,
    subject,
    subject_of_kind,
)

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FIRST_IDS = {"0": 20, "A": 37, "a": 69}  # of models/tiny, whose letters follow each other
IDS = [next(start + ord(c) - ord(first) for first, start in reversed(FIRST_IDS.items()) if c >= first) for c in LETTERS]
BEAT_SECONDS = 0.25
RAMP = 50  # connections begun at a time
DELAY_GOAL_MS, CPU_GOAL = 50.0, 3.0
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef01234567","object":"text_completion","created":1700000000,"model":"tiny",'
    b'"choices":[{"index":0,"text":"x","logprobs":null,"finish_reason":null}]}\n\n'
)


# ---- the worker's side of the bus


class Steps:
    """So many batches, a step of each every 1/rate seconds. `times`: when each step was published."""

    def __init__(self, bus: Bus, rate: float, batches: int) -> None:
        self._bus, self._rate, self._admitted = bus, rate, 0
        self.times: list[float] = []
        self._batches: list[dict[str, list[int]]] = [{} for _ in range(batches)]  # id -> [tokens sent, in all]
        self._gateway = ""

    async def start(self) -> None:
        for where, handler in (
            (subject("worker", "w", "admit"), self._on_admit),
            (subject("worker", "w", "abort"), self._on_abort),
            (subject("worker", "w", "resume"), self._on_resume),
            (subject_of_kind("assign"), self._on_assign),
        ):
            await self._bus.subscribe(where, handler, concurrency=16)

    async def beat(self) -> None:
        worker = WorkerBeat(
            id="w", boot_id="1", node="n", model="m", state="ready", map_version=1, running=sum(map(len, self._batches))
        )
        scheduler = SchedulerBeat(id="s", boot_id="1", state="ready", map_version=1)
        while True:
            await self._bus.publish(subject("worker", "w", "beat"), worker)
            await self._bus.publish(subject("scheduler", "s", "beat"), scheduler)
            await asyncio.sleep(BEAT_SECONDS)

    async def run(self) -> None:
        began = time.monotonic()
        while True:
            step, count = len(self.times), len(self._batches)
            await asyncio.sleep(max(0.0, began + step / (self._rate * count) - time.monotonic()))
            token, chunks, batch = (IDS[step % len(IDS)],), [], self._batches[step % count]
            for request_id, state in list(batch.items()):
                index, most = state
                last = index + 1 == most
                chunks.append(TokenChunk(request_id, index, token, finish="length" if last else None))
                state[0] += 1
                if last:
                    del batch[request_id]
            self.times.append(time.monotonic())
            if chunks:
                message = StepTokens(worker_id="w", boot_id="1", chunks=tuple(chunks))
                await self._bus.publish(subject("gateway", self._gateway, "tokens"), message)

    async def _on_admit(self, _: str, message: Message) -> Message:
        assert isinstance(message, Generate)
        self._gateway = message.gateway_id
        self._batches[self._admitted % len(self._batches)][message.request_id] = [0, message.sampling.max_tokens]
        self._admitted += 1
        return Ok()

    async def _on_abort(self, _: str, message: Message) -> None:
        assert isinstance(message, Abort)
        for request_id in message.request_ids:
            for batch in self._batches:
                batch.pop(request_id, None)

    async def _on_resume(self, _: str, message: Message) -> Message:
        assert isinstance(message, Resume)
        return StepTokens(worker_id="w", boot_id="1", chunks=())

    async def _on_assign(self, _: str, message: Message) -> Message:
        assert isinstance(message, Assign)
        return Assigned(worker_id="w", worker_boot_id="1")


async def worker(url: str, rate: float, batches: int) -> None:
    """Until stdin closes; then the times of its steps go to stdout."""
    from common.nats_bus import NatsBus

    bus = NatsBus(url, "steps")
    await bus.connect()
    steps = Steps(bus, rate, batches)
    await steps.start()
    tasks = [asyncio.create_task(steps.beat()), asyncio.create_task(steps.run())]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    print(json.dumps(steps.times), flush=True)
    await bus.close()


# ---- the client


class Reader(asyncio.Protocol):
    """One stream. Of each token the moment its bytes came, and its letter."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.moments, self.letters = array("d"), bytearray()
        self.failed = ""
        self.ended = asyncio.get_running_loop().create_future()
        self._rest = b""

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self._rest and not self.letters and not data.startswith(b"HTTP/1.1 200"):
            self.failed = data[:300].decode(errors="replace")
        text = self._rest + data
        at = 0
        while (found := text.find(b'"text":"', at)) >= 0 and (end := text.find(b'"', found + 8)) >= 0:
            for letter in text[found + 8 : end]:
                self.moments.append(now)
                self.letters.append(letter)
            at = end
        self._rest = text[at:][-64:]

    def connection_lost(self, _: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def client(port: int, streams: int, tokens: int, stuck: int) -> None:
    """Prints `going` when every stream has a token, and at the end what it saw, as a line of JSON."""
    body = {"model": "tiny", "prompt": [20], "max_tokens": tokens, "stream": True, "ignore_eos": True}
    payload = msgspec.json.encode(body)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(payload)}\r\n\r\n"
    request, loop = head.encode() + payload, asyncio.get_running_loop()
    silent = []
    for _ in range(stuck):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", port))
        sock.sendall(request)
        silent.append(sock)
    gate, readers = asyncio.Semaphore(RAMP), []

    async def begin() -> None:
        async with gate:
            _, reader = await loop.create_connection(lambda: Reader(request), "127.0.0.1", port)
            readers.append(reader)
            while not reader.letters and not reader.ended.done():
                await asyncio.sleep(0.01)

    await asyncio.gather(*(begin() for _ in range(streams)))
    print("going", flush=True)
    await asyncio.wait([reader.ended for reader in readers])
    for sock in silent:
        sock.close()
    seen = [(reader.moments.tolist(), reader.letters.decode(), reader.failed) for reader in readers]
    print(json.dumps(seen), flush=True)


# ---- the peer


async def bare(port: int, rate: float) -> None:
    """The same bytes at the same moments, by starlette and uvicorn alone."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    turn = asyncio.Event()

    async def tick() -> None:
        nonlocal turn
        began, step = time.monotonic(), 0
        while True:
            step += 1
            await asyncio.sleep(max(0.0, began + step / rate - time.monotonic()))
            turn, before = asyncio.Event(), turn
            before.set()

    async def events(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            await turn.wait()
            yield EVENT

    async def complete(request: Request) -> StreamingResponse:
        count = json.loads(await request.body())["max_tokens"]
        return StreamingResponse(events(count), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
    ticking = asyncio.create_task(tick())
    config = uvicorn.Config(app, port=port, http="h11", ws="none", lifespan="off", log_config=None, access_log=False)
    await uvicorn.Server(config).serve()
    ticking.cancel()


# ---- the whole


def spawn(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, preexec_fn=die_with_parent, **options)


def role(name: str, *arguments: object) -> subprocess.Popen[str]:
    return spawn("-m", "benchmarks.streams", "--role", name, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@contextlib.contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(port: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"nobody listens on port {port}")
        time.sleep(0.05)


class Seen(msgspec.Struct):
    streams: list[tuple[list[float], str, str]]
    cpu_us: float  # a token
    memory: float  # KB a stream


def watch(pid: int, port: int, streams: int, rate: float, seconds: float, stuck: int) -> Seen:
    before, tokens = memory_kb(pid), int(rate * (seconds + 10))
    reading = role("client", port, streams, tokens, stuck)
    assert reading.stdout is not None
    with ended(reading):
        assert reading.stdout.readline() == "going\n"
        began, used = time.monotonic(), cpu_seconds(pid)
        time.sleep(seconds)
        spent, took = cpu_seconds(pid) - used, time.monotonic() - began
        memory = (memory_kb(pid) - before) / streams
        found = json.loads(reading.stdout.readline())
    return Seen([tuple(one) for one in found], 1e6 * spent / (streams * rate * took), memory)


def through_the_gateway(
    streams: int, rate: float, seconds: float, stuck: int, batches: int
) -> tuple[Seen, list[float]]:
    port, nats_port = free_ports(2)
    url = f"nats://127.0.0.1:{nats_port}"
    env = {key: value for key, value in os.environ.items() if not key.startswith("MOECULE_")}
    env |= {"MOECULE_PORT": str(port), "MOECULE_NATS_URL": url, "MOECULE_LOG_LEVEL": "warning"}
    with tempfile.TemporaryDirectory() as store, tempfile.TemporaryFile() as log:
        command = [nats_binary(), "-c", "nats.conf", "-p", str(nats_port), "-sd", store]
        nats = subprocess.Popen(command, cwd=ROOT, stderr=log, text=True, preexec_fn=die_with_parent)
        with ended(nats):
            wait_for(nats_port)
            steps, gateway = role("worker", url, rate, batches), spawn("-m", "services.gateway", env=env)
            assert steps.stdout is not None
            with ended(steps, gateway):
                assert steps.stdout.readline() == "ready\n"
                wait_for(port)
                time.sleep(1.0)  # heartbeats
                seen = watch(gateway.pid, port, streams, rate, seconds, stuck)
                times = json.loads(steps.communicate(timeout=30)[0].splitlines()[-1])
    return seen, times


def bare_cpu(streams: int, rate: float, seconds: float) -> float:
    (port,) = free_ports(1)
    app = role("bare", port, rate)
    with ended(app):
        wait_for(port)
        return watch(app.pid, port, streams, rate, seconds, 0).cpu_us


def delays(seen: Seen, times: list[float], batches: int) -> tuple[list[float], int]:
    """Milliseconds of every token, and how many did not follow the one before. (Whose first token is later than 62
    steps counts too little by that.)"""
    found, wrong = [], 0
    for moments, letters, _ in seen.streams:
        step = -1
        for moment, letter in zip(moments, letters, strict=True):
            place = LETTERS.index(letter)
            if step < 0:  # the latest step with that letter that was published before
                step = max(k for k in range(place, len(times), len(LETTERS)) if times[k] <= moment)
            else:
                step += batches
                wrong += place != step % len(LETTERS)
            if step < len(times):
                found.append(1e3 * (moment - times[step]))
    return found, wrong


def measure(streams: int, rate: float, seconds: float, stuck: int, batch: int) -> bool:
    batches = -(-(streams + stuck) // batch)
    print(f"{streams} streams: the gateway", file=sys.stderr, flush=True)
    seen, times = through_the_gateway(streams, rate, seconds, stuck, batches)
    print(f"{streams} streams: a bare starlette application", file=sys.stderr, flush=True)
    peer = bare_cpu(streams, rate, seconds)
    failed = [why for _, _, why in seen.streams if why]
    short = sum(len(letters) != int(rate * (seconds + 10)) for _, letters, _ in seen.streams)
    late, wrong = delays(seen, times, batches)
    late.sort()
    p99, ratio = late[int(0.99 * len(late))], seen.cpu_us / peer
    print(
        f"| {streams} | {rate:g} | {len(failed)} | {short} | {wrong} | {statistics.median(late):.1f} | {p99:.1f} | "
        f"{late[-1]:.0f} | {seen.cpu_us:.0f} | {peer:.0f} | {ratio:.2f} | {seen.memory:.0f} |",
        flush=True,
    )
    if failed:
        print(failed[0], file=sys.stderr)
    return not failed and not short and not wrong and p99 < DELAY_GOAL_MS and ratio <= CPU_GOAL


def main() -> int:
    if sys.argv[1:2] == ["--role"]:
        name, arguments = sys.argv[2], sys.argv[3:]
        if name == "worker":
            uvloop.run(worker(arguments[0], float(arguments[1]), int(arguments[2])))
        elif name == "client":
            uvloop.run(client(*map(int, arguments)))
        else:
            uvloop.run(bare(int(arguments[0]), float(arguments[1])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="1000x10,300x50", help="streams x tokens a second of each")
    parser.add_argument("--seconds", type=float, default=15.0, help="that CPU time is measured for")
    parser.add_argument("--stuck", type=int, default=20, help="further clients that read nothing")
    parser.add_argument("--batch", type=int, default=64, help="streams of a step")
    options = parser.parse_args()
    print(
        f"{os.cpu_count()} processors, {options.stuck} further clients read nothing, steps of {options.batch}\n\n"
        f"| streams | tokens/s each | failed | short | out of order | delay ms, median | p99 (goal {DELAY_GOAL_MS:g}) "
        f"| most | CPU us a token | bare starlette | ratio (goal {CPU_GOAL:g}) | KB a stream |\n"
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        flush=True,
    )
    points = [point.split("x") for point in options.points.split(",")]
    good = [
        measure(int(streams), float(rate), options.seconds, options.stuck, options.batch) for streams, rate in points
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

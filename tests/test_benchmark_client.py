"""The client of benchmarks.serve: its figures, its reader of HTTP and events, and what it says of bad servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import socket
from array import array
from collections.abc import AsyncIterator, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.client import Endpoint, Record, Request, ask
from benchmarks.sse import BadAnswer, Events, Response
from benchmarks.timing import Spread, intervals, number, percentile, spread_tokens, tpot

# ---- figures


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([7.0], 99, 7.0), ([1.0, 2.0, 3.0, 4.0], 50, 2.5), (list(range(101)), 99, 99), ([0.0, 10.0], 99, 9.9)],
)
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_a_spread_is_in_milliseconds_and_sorts() -> None:
    spread = Spread.of_seconds([0.004, 0.001, 0.003, 0.002, 0.005])
    assert (spread.median, spread.p99) == (pytest.approx(3.0), pytest.approx(4.96))
    assert str(Spread.of_seconds([])) == "- / -"


def test_tpot_is_the_time_after_the_first_token_by_the_tokens_after_it() -> None:
    assert tpot([10.0, 10.5, 13.0], tokens=7) == pytest.approx(0.5)
    assert math.isnan(tpot([10.0], tokens=1)) and math.isnan(tpot([], tokens=0))


def test_a_chunk_of_several_tokens_shares_its_pause_among_them() -> None:
    found = list(intervals([0.0, 1.0, 2.5, 3.0], [1, 2, 5, 6]))
    assert found == [(1.0, 1.0), (2.5, 0.5), (2.5, 0.5), (2.5, 0.5), (3.0, 0.5)]


def test_a_chunk_without_a_token_lengthens_the_next_interval() -> None:
    assert list(intervals([0.0, 1.0, 3.0], [1, 1, 2])) == [(3.0, 3.0)]


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), min_size=1, max_size=20))
def test_intervals_are_one_a_token_and_add_up_to_the_stream(chunks: list[tuple[float, int]]) -> None:
    times = list(itertools.accumulate(pause for pause, _ in chunks))
    counts = list(itertools.accumulate(tokens for _, tokens in chunks))
    found = [interval for _, interval in intervals(times, counts)]
    assert len(found) == counts[-1] - counts[0]
    assert sum(found) == pytest.approx(times[-1] - times[0])


@given(st.integers(1, 50), st.integers(1, 200))
def test_tokens_that_no_chunk_told_are_spread_evenly(chunks: int, tokens: int) -> None:
    counts = spread_tokens(range(1, chunks + 1), tokens)
    shares = [after - before for before, after in itertools.pairwise([0, *counts])]
    assert counts[-1] == tokens and max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "-"), (0.0, "0.00"), (0.123, "0.123"), (9.876, "9.88"), (1234.5, "1,234")]
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


# ---- HTTP and events

CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nx: y\r\n\r\n"
    b"5;name=value\r\nab\r\nc\r\n1\r\nd\r\nA\r\n0123456789\r\n0\r\n\r\n"
)
SIZED = b"HTTP/1.1 404 Not Found\r\ncontent-length: 6\r\n\r\n{a\r\n\r}"
UNTIL_CLOSED = b"HTTP/1.0 200 OK\r\n\r\nall of it"
ANSWERS = {
    "chunked": (CHUNKED, 200, b"ab\r\ncd0123456789", True),
    "sized": (SIZED, 404, b"{a\r\n\r}", True),
    "until closed": (UNTIL_CLOSED, 200, b"all of it", False),
}


def in_two(data: bytes) -> Iterable[tuple[bytes, bytes]]:
    return ((data[:i], data[i:]) for i in range(len(data) + 1))


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_split_at_any_byte_is_the_same(name: str) -> None:
    data, status, body, ends = ANSWERS[name]
    for pieces in [*in_two(data), [bytes([byte]) for byte in data]]:
        response = Response()
        assert b"".join(response.feed(piece) for piece in pieces) == body
        assert (response.status, response.ended) == (status, ends)


@pytest.mark.parametrize(
    "data",
    [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", CHUNKED[:-9] + b"x" * 9],
)
def test_what_is_no_http_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(BadAnswer):
        Response().feed(data)


@pytest.mark.parametrize("blank", [b"\n\n", b"\r\n\r\n", b"\n"])
def test_events_split_at_any_byte_are_the_same(blank: bytes) -> None:
    data = blank.join([b'data: {"a": 1}', b": a comment", b"event: x", b"data:two", b"data: [DONE]", b""])
    for pieces in [*in_two(data), [bytes([byte]) for byte in data]]:
        events = Events()
        found = [event for piece in pieces for event in events.feed(piece)]
        assert found == [b'{"a": 1}', b"two", b"[DONE]"]


# ---- what came of a request


def chunk(text: str | None = "x", *, tokens: int | None = None, finish: str | None = None) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": finish}]
    usage = None if tokens is None else {"prompt_tokens": 9, "completion_tokens": tokens}
    return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"


STREAM = b"HTTP/1.1 200 OK\r\n\r\n"
DONE = b"data: [DONE]\n\n"
REFUSAL = b'HTTP/1.1 400 Bad Request\r\ncontent-length: 12\r\n\r\n{"error": 1}'


@contextlib.asynccontextmanager
async def server(*pieces: bytes, stay: bool = False) -> AsyncIterator[Endpoint]:
    """Sends these, a pause between them, and hangs up unless it is to `stay`."""
    left, answering = asyncio.Event(), set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.005)
        if stay:
            await left.wait()
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listening:
        yield Endpoint.of(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1/")
        left.set()
        await asyncio.gather(*answering)


async def answered(*pieces: bytes, tokens: int = 4, stay: bool = False, silence: float = 5.0) -> Record:
    record = Record()
    async with server(*pieces, stay=stay) as endpoint:
        await ask(endpoint, Request(b"{}", tokens), record, silence)
    return record


async def test_chunks_that_tell_the_usage_so_far() -> None:
    first, two, last = chunk("a", tokens=1), chunk("bc", tokens=3), chunk("", tokens=4, finish="length")
    record = await answered(STREAM + first, two, last, chunk(None, tokens=4) + DONE, stay=True)
    assert (record.error, record.complete, list(record.counts)) == ("", True, [1, 3, 4])
    assert record.usage is not None and record.usage.prompt_tokens == 9
    assert record.began < record.times[0] < record.times[1] - 0.003 < record.times[2]


async def test_chunks_that_tell_nothing_share_the_tokens_of_the_last_usage() -> None:
    pieces = STREAM + chunk("a"), chunk("bcd"), chunk("", finish="length")
    record = await answered(*pieces, chunk(None, tokens=4) + DONE)
    assert record.complete and list(record.counts) == [2, 4], "the chunk that only ends it brought none"


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ((REFUSAL,), 'HTTP 400: {"error": 1}'),
        ((STREAM, b'data: {"error": {"message": "lost"}}\n\n', DONE), 'the stream says: {"message":"lost"}'),
        ((STREAM + chunk(tokens=1),), "the answer ended early"),
        ((b"",), "the answer ended early"),
        ((STREAM + chunk(tokens=3), DONE), "3 tokens instead of 4"),
        ((STREAM + chunk(), DONE), "the stream tells no usage"),
        ((STREAM + b"data: {,\n\n",), "it cannot be read: "),
        ((b"220 mail\r\n\r\n",), "it cannot be read: "),
    ],
)
async def test_a_request_that_fails_says_why(pieces: tuple[bytes, ...], why: str) -> None:
    record = await answered(*pieces)
    assert record.error.startswith(why) and not record.complete


async def test_a_silent_server_fails_the_request() -> None:
    record = await answered(STREAM + chunk(tokens=1), stay=True, silence=0.05)
    assert record.error == "nothing came for 0 s" and record.counts == array("q", [1])


async def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        record = Record()
        await ask(Endpoint("127.0.0.1", free.getsockname()[1], "/v1", False, ""), Request(b"", 1), record, 5.0)
    assert record.error.startswith("no connection: ")

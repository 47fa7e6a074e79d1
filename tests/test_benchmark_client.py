"""The client of benchmarks.serve: its figures, its reader of HTTP and events, and what it says of bad servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import socket
import xml.etree.ElementTree as ElementTree
from array import array
from collections.abc import AsyncIterator, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.beside import span
from benchmarks.client import Endpoint, Record, Request, ask
from benchmarks.plot import HEIGHT, LEFT, TOP, WIDTH, Curve, Point, svg, ticks
from benchmarks.sse import BadAnswer, Events, Response
from benchmarks.timing import Spread, intervals, number, percentile, spread_tokens, tpot
from benchmarks.traffic import Maker, reasons

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


def test_a_span_has_the_tokens_that_came_in_it() -> None:
    one = Record(times=array("d", [0.0, 1.0, 2.0, 5.0, 9.0]), counts=array("q", [1, 2, 4, 7, 8]))
    other = Record(times=array("d", [1.5, 3.5]), counts=array("q", [1, 2]))
    found = span([one, other, Record()], began=2.0, ended=9.0, streams=2, cpu=0.25)
    # 2 tokens at 2.0 s after 1 s, 3 at 5.0 s after 3 s, 1 at 3.5 s after 2 s; what came at 9.0 s is of the next span.
    assert (found.itl_ms.median, found.itl_ms.p99) == (pytest.approx(1000), pytest.approx(1950))
    assert (found.longest_pause_ms, found.tokens_per_second) == (3000, pytest.approx(6 / 7 / 2))
    assert (found.seconds, found.client_cpu) == (7.0, 0.25)


def test_reasons_that_differ_in_numbers_are_one() -> None:
    errors = ["3 tokens instead of 9", "nothing came", "", "4 tokens instead of 8", "3 tokens instead of 7"]
    assert reasons([Record(error=error) for error in errors]) == ["3 x 3 tokens instead of 9", "1 x nothing came"]


@given(st.floats(1e-3, 1e6))
def test_ticks_go_from_0_to_just_above(largest: float) -> None:
    found = ticks(largest)
    assert found[0] == 0 and found[-2] < largest <= found[-1] * (1 + 1e-9) and 4 <= len(found) <= 8


def test_a_plot_has_a_mark_at_each_point_of_each_curve() -> None:
    curves = [Curve("a<b & c", [Point(1.0, 2.0, "c4"), Point(2.0, 1.0, "c8")]), Curve("d", [Point(20.0, 30.0, "c2")])]
    page = ElementTree.fromstring(svg("t", "x", "y", curves))
    assert {"a<b & c", "d", "c4", "c8", "c2"} <= {element.text for element in page.iter()}
    places = [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in page.iter() if "cx" in e.attrib]
    (x4, y4), (x8, y8), (x2, y2) = places
    assert LEFT < x4 < x8 < x2 < WIDTH and HEIGHT > y8 > y4 > y2 > TOP, "y grows upwards"


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
async def server(*pieces: bytes, stay: bool = False, refused: bytes = b"") -> AsyncIterator[Endpoint]:
    """Sends these, a pause between them, and hangs up unless it is to `stay`; 400 to a body that has `refused`."""
    left = asyncio.Event()
    answering: set[asyncio.Task[None] | None] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(head.rpartition(b"content-length: ")[2]))
        for piece in [REFUSAL] if refused and refused in body else pieces:
            writer.write(piece)
            await asyncio.sleep(0.005)
        if stay:
            await left.wait()
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listening:
        yield Endpoint.of(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1/")
        left.set()
        await asyncio.gather(*filter(None, answering))


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
        ((STREAM + chunk(None, tokens=4), DONE), "the usage tells of tokens, and no chunk brought one"),
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


@pytest.mark.parametrize("knows", [True, False])
async def test_a_server_that_knows_no_salt_is_sent_none(knows: bool) -> None:
    maker = Maker("m", vocabulary=100, temperature=0.0)
    answer = STREAM + chunk(tokens=2) + DONE
    async with server(answer, refused=b"" if knows else b"cache_salt") as endpoint:
        assert await maker.try_out(endpoint, silence=5.0) == ""
    assert maker.extras == knows


async def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        record = Record()
        await ask(Endpoint("127.0.0.1", free.getsockname()[1], "/v1", False, ""), Request(b"", 1), record, 5.0)
    assert record.error.startswith("no connection: ")

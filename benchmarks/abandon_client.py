"""A client that asks for a completion and may lose patience at any point. Plain sockets: what HTTP clients tidy up
when they are closed is what this one leaves lying about."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from dataclasses import dataclass
from random import Random
from typing import Any

ANSWER_SECONDS = 60.0
MOST_STALL_SECONDS = 3.0
HOW = ("reads all", "leaves after some events", "leaves at once", "stalls, then leaves", "sends half a body")
CHAT = {"messages": [{"role": "user", "content": "Tell a story of a fox."}]}
ASKED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("chat, streamed", "/v1/chat/completions", CHAT | {"stream": True}),
    ("chat, streamed, n=2", "/v1/chat/completions", CHAT | {"stream": True, "n": 2}),
    ("chat", "/v1/chat/completions", CHAT | {"n": 2}),
    ("text, streamed", "/v1/completions", {"prompt": "Once upon a time", "stream": True}),
    ("text", "/v1/completions", {"prompt": "Once upon a time", "echo": True}),
)


@dataclass(frozen=True)
class Visit:
    name: str  # what was asked for, and how the client behaved
    seconds: float
    received: int  # bytes
    wrong: str  # empty: it went as it must


def visit(port: int, draw: Random) -> Visit:
    what, path, fields = draw.choice(ASKED)
    how = draw.choice(HOW)
    data = json.dumps({"model": "tiny", "max_tokens": draw.randint(1, 80), "ignore_eos": True} | fields).encode()
    began = time.monotonic()
    received, wrong = b"", ""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
            if draw.random() < 0.5:  # a close without a word of goodbye: RST
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(_head(path, len(data)) + (data[: len(data) // 2] if how == HOW[4] else data))
            received = _read(connection, draw, how)
    except OSError as error:
        wrong = f"{type(error).__name__}: {error}"
    if how == HOW[0]:
        wrong = wrong or _missing(received, fields)
    elif received and not received.startswith(b"HTTP/1.1 200 "):
        wrong = wrong or received[:80].decode(errors="replace")
    return Visit(f"{what}: {how}", time.monotonic() - began, len(received), wrong)


def _head(path: str, size: int) -> bytes:
    more = "host: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"POST {path} HTTP/1.1\r\n{more}content-length: {size}\r\n\r\n".encode()


def _read(connection: socket.socket, draw: Random, how: str) -> bytes:
    """What was read until it was enough."""
    received = bytearray()
    if how == "reads all":
        while data := connection.recv(1 << 16):
            received += data
    elif how == "leaves after some events":
        events = draw.randint(1, 20)
        while received.count(b"\n\n") < events and (data := connection.recv(1 << 12)):
            received += data
    elif how == "stalls, then leaves":
        received += connection.recv(200)
        time.sleep(draw.uniform(0.1, MOST_STALL_SECONDS))
    else:
        time.sleep(draw.choice((0.0, draw.uniform(0.0, 0.3))))
    return bytes(received)


def _missing(answer: bytes, fields: dict[str, Any]) -> str:
    """Why this is no whole answer."""
    if not answer.startswith(b"HTTP/1.1 200 "):
        return answer[:80].decode(errors="replace") or "no answer"
    choices = fields.get("n", 1)
    if len(re.findall(rb'"finish_reason": ?"length"', answer)) != choices:
        return "a choice has no end"
    return "no [DONE]" if fields.get("stream") and b"data: [DONE]" not in answer else ""

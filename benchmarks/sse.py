"""An HTTP/1.1 answer and the server-sent events in it, read as the bytes arrive, in whatever pieces they come."""

from __future__ import annotations


class BadAnswer(ValueError):
    """What came is not HTTP as this client reads it."""


class Response:
    """The status and the body, whether that comes in chunks, with a length, or ends with the connection."""

    def __init__(self) -> None:
        self.status = 0  # until the head is there
        self.ended = False
        self._bytes = bytearray()
        self._read = self._head
        self._left = 0  # bytes of the body, or of this chunk of it

    def feed(self, data: bytes) -> bytes:
        """The part of the body that these bytes bring."""
        self._bytes += data
        body = bytearray()
        while not self.ended and self._read(body):
            pass
        return bytes(body)

    # Each of these takes one piece from the front, if all of it is there, and says whether it did.

    def _head(self, body: bytearray) -> bool:
        if (end := self._bytes.find(b"\r\n\r\n")) < 0:
            return False
        first, *lines = bytes(self._bytes[:end]).decode("latin-1").split("\r\n")
        del self._bytes[: end + 4]
        version, status, *_ = [*first.split(" ", 2), ""]
        if not version.startswith("HTTP/1.") or not status.isdecimal():
            raise BadAnswer(f"no HTTP/1.1 answer: {first[:80]!r}")
        if status.startswith("1"):
            return True  # "continue" and its like: the answer comes after it
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status = int(status)
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._read = self._chunk_size
        elif "content-length" in headers:
            self._left = _number(headers["content-length"], 10)
            self._read = self._rest
        else:
            self._read = self._until_the_end
        return True

    def _chunk_size(self, body: bytearray) -> bool:
        if (end := self._bytes.find(b"\r\n")) < 0:
            return False
        self._left = _number(self._bytes[:end].partition(b";")[0].decode("latin-1"), 16)
        del self._bytes[: end + 2]
        self.ended = not self._left  # trailers say nothing that is wanted here
        self._read = self._chunk
        return True

    def _chunk(self, body: bytearray) -> bool:
        self._take(body)
        if self._left or len(self._bytes) < 2:
            return False
        if self._bytes[:2] != b"\r\n":
            raise BadAnswer("a chunk is longer than its size")
        del self._bytes[:2]
        self._read = self._chunk_size
        return True

    def _rest(self, body: bytearray) -> bool:
        self._take(body)
        self.ended = not self._left
        return False

    def _until_the_end(self, body: bytearray) -> bool:
        body += self._bytes
        self._bytes.clear()
        return False

    def _take(self, body: bytearray) -> None:
        part = self._bytes[: self._left]
        body += part
        del self._bytes[: len(part)]
        self._left -= len(part)


class Events:
    """The data of server-sent events. A line is an event: the JSON in an OpenAI stream has no line breaks, and not
    every server puts the empty line behind it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, body: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + body).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def _number(text: str, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise BadAnswer(f"no length: {text[:80]!r}") from None

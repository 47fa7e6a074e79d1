"""What judges answers under attack (`python -m benchmarks.hostile_gpu`) can say no."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from benchmarks.hostile_odd import Answer, Odd, Scored, ask, body, same


def told(*tokens: int, second: float = -9.0) -> Answer:
    """Each token has logprob 0, and the next number is the second best."""
    scored = [Scored(str(token), 0.0, {str(token): 0.0, str(token + 1): second}) for token in tokens]
    return Answer(200, [*tokens], scored=scored, finish="length")


def test_texts_may_part_only_where_the_best_are_close() -> None:
    assert same(told(1, 2), told(1, 2), 0.0)
    assert not same(told(1, 2, second=-0.1), told(1, 3), 0.0)
    assert same(told(1, 2, second=-0.1), told(1, 3), 0.25)
    assert not same(told(1, 2, second=-0.3), told(1, 3), 0.25)
    assert not same(told(1, 2, second=-0.1), told(1, 7), 0.25), "it was not among the best"
    assert not same(told(1, 2), told(1), 0.25)
    assert not same(Answer(error="gone"), Answer(error="gone"), 0.25), "two failures are no text"


@pytest.mark.parametrize(
    ("status", "answer", "good"),
    [
        (200, told(1), True),
        (200, told(1, 2), False),
        (200, Answer(400, error="this must not have been refused"), False),
        (200, Answer(200, [1], finish="length", broken="no [DONE]"), False),
        (400, Answer(400, error="the prompt is too long"), True),
        (400, Answer(400, error="no"), False),
        (400, Answer(500, error="the prompt is too long"), False),
        (400, told(1), False),
    ],
)
def test_what_an_odd_request_must_get(status: int, answer: Answer, good: bool) -> None:
    assert (not Odd("x", [], status, lambda found: found.whole(1)).wrong(answer)) == good


ENDS = {
    "whole": b'data: {"choices": [{"token_ids": [1, 2], "text": "ab", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n',
    "told": b'data: {"choices": [{"token_ids": [1], "text": "a", "finish_reason": null}]}\n\n'
    b'data: {"error": {"message": "worker w is gone", "code": "worker_lost"}}\n\n',
    "silent": b'data: {"choices": [{"token_ids": [1], "text": "a", "finish_reason": null}]}\n\n',
}


class Server(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(ENDS[self.path.split("/")[1]])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_how_a_stream_ends(url: str) -> None:
    whole, ended, silent = (ask(f"{url}/{end}", body("x", 2)) for end in ENDS)
    assert whole.whole(2) and whole.text == "ab"
    assert not ended.broken and ended.outcome == "worker_lost" and ended.error == "worker w is gone"
    assert "without [DONE]" in silent.broken and not silent.error

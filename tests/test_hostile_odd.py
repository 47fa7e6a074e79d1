"""What judges answers under attack (`python -m benchmarks.hostile_gpu`) can say no."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from benchmarks.hostile_odd import Answer, Odd, Scored, ask, body, differences, same, scoring


def told(*tokens: int, prompt: tuple[int, ...] = (7, 8), logprob: float | None = -0.5) -> Answer:
    scored = [Scored(str(token), logprob, None) for token in tokens]
    return Answer({"prompt": [*prompt]}, 200, [*tokens], scored=scored, finish="length")


def scores(*logprobs: float | None) -> Answer:
    return Answer(status=200, scored=[Scored("t", one, None) for one in logprobs], finish="length")


def test_texts_are_the_same_token_by_token() -> None:
    assert same(told(1, 2), told(1, 2))
    assert not same(told(1, 2), told(1, 3))
    assert not same(told(1, 2), told(1))
    assert not same(Answer(error="gone"), Answer(error="gone")), "two failures are no text"


def test_a_text_is_scored_behind_its_prompt() -> None:
    asked = scoring(told(1, 2))
    assert asked["prompt"] == [7, 8, 1, 2] and asked["max_tokens"] == 0 and asked["echo"]
    assert differences(told(1, 2), scores(None, -9.0, -0.5, -0.75)) == [0.0, 0.25]


def test_what_has_no_score_is_far_off() -> None:
    assert differences(told(1, 2), scores(None, -9.0, -0.5)) == [math.inf] * 2
    assert differences(told(1, 2), Answer(error="refused")) == [math.inf] * 2
    assert differences(told(1, 2, logprob=None), scores(None, -9.0, -0.5, -0.75)) == [math.inf] * 2
    assert differences(Answer({"prompt": [7, 8]}, error="gone"), scores(None, -9.0)) == [math.inf]


@pytest.mark.parametrize(
    ("status", "answer", "good"),
    [
        (200, told(1), True),
        (200, told(1, 2), False),
        (200, Answer({}, 400, error="this must not have been refused"), False),
        (200, Answer({}, 200, [1], finish="length", broken="no [DONE]"), False),
        (400, Answer({}, 400, error="the prompt is too long"), True),
        (400, Answer({}, 400, error="no"), False),
        (400, Answer({}, 500, error="the prompt is too long"), False),
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

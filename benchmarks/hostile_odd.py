"""Completions whose answers are kept whole, and odd ones with what their answers must be."""

from __future__ import annotations

import http.client
import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

CONTEXT, VOCABULARY = 4096, 2048  # tokens, of models/tiny
SILENCE = 60.0  # seconds
SCHEMA = {
    "type": "object", "required": ["ok", "kind"], "additionalProperties": False,
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["ab", "cd"]}},
}  # fmt: skip

Body = dict[str, Any]


class Scored(NamedTuple):
    token: str
    logprob: float | None
    best: dict[str, float] | None


@dataclass
class Answer:
    asked: Body = field(default_factory=dict)
    status: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    finish: str = ""
    error: str = ""  # the server's reason
    code: str = ""
    retry_after: str = ""
    broken: str = ""  # it ended as no answer may
    ended: float = 0.0

    def take(self, data: dict[str, Any]) -> None:
        if error := data.get("error"):
            self.error, self.code = error["message"], str(error["code"])
        for choice in data.get("choices", ()):
            self.tokens += choice.get("token_ids") or ()
            self.text += choice["text"]
            self.finish = choice["finish_reason"] or self.finish
            if found := choice.get("logprobs"):
                lists = found["tokens"], found["token_logprobs"], found["top_logprobs"]
                self.scored += map(Scored, *lists)

    @property
    def outcome(self) -> str:
        return self.broken or self.code or self.finish or str(self.status)

    def whole(self, tokens: int) -> bool:
        return not self.broken and not self.error and self.finish == "length" and len(self.tokens) == tokens


def ask(url: str, body: Body, begun: threading.Event | None = None) -> Answer:
    """`begun` is set after three tokens, or at the end."""
    answer = Answer(body)
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SILENCE) as got:
            answer.status = got.status
            if body["stream"]:
                _read(got, answer, begun)
            else:
                answer.take(json.load(got))
    except urllib.error.HTTPError as refused:
        answer.status, answer.retry_after = refused.code, refused.headers.get("retry-after", "")
        answer.take(json.load(refused))
    except (OSError, http.client.HTTPException, ValueError) as error:
        answer.broken = repr(error)
    answer.ended = time.monotonic()
    if begun:
        begun.set()
    return answer


def _read(lines: http.client.HTTPResponse, answer: Answer, begun: threading.Event | None) -> None:
    done = False
    for line in lines:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            done = True
        elif data.startswith(b"{"):
            answer.take(json.loads(data))
            if begun and len(answer.tokens) >= 3:
                begun.set()
    if not done and not answer.error:
        answer.broken = "the stream ended without [DONE] and without a reason"


def prompt(length: int, seed: int) -> list[int]:
    draw = Random(seed)
    return [draw.randrange(300, VOCABULARY - 300) for _ in range(length)]


def body(asked: str | list[int], tokens: int, **more: Any) -> Body:
    return {
        "model": "tiny", "prompt": asked, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "stream": True,
    } | more  # fmt: skip


def questions(count: int, tokens: int) -> list[Body]:
    """Shorter than a page, so that none is answered from the prefix cache."""
    return [body(prompt(20 + n % 7, 1000 + n), tokens, logprobs=5) for n in range(count)]


def same(one: Answer, two: Answer) -> bool:
    """Token by token."""
    return one.finish == two.finish == "length" and one.tokens == two.tokens


def scoring(answer: Answer) -> Body:
    """Asks for the scores of a text that was told, its prompt being one of tokens."""
    return body(answer.asked["prompt"] + answer.tokens, 0, echo=True, logprobs=1, stream=False)


def differences(answer: Answer, scores: Answer) -> list[float]:
    """Between the logprobs of a text's tokens as they were told and as `scoring` has them; infinite where one has
    none."""
    again = scores.scored[len(answer.asked["prompt"]) :]
    if not answer.finish or not len(answer.tokens) == len(answer.scored) == len(again):
        return [math.inf] * max(1, len(answer.tokens))
    pairs = zip(answer.scored, again, strict=True)
    return [math.inf if None in (a.logprob, b.logprob) else abs(a.logprob - b.logprob) for a, b in pairs]  # type: ignore[operator]


class Odd(NamedTuple):
    name: str
    bodies: list[Body]
    status: int = 200
    right: Callable[[Answer], bool] = lambda answer: True

    def wrong(self, answer: Answer) -> str:
        if answer.broken or answer.status != self.status or bool(answer.error) != (self.status != 200):
            return f"{answer.status} {answer.outcome} {answer.error}"
        if self.status != 200:
            return "" if len(answer.error.split()) > 3 else f"{answer.error!r} is no sentence"
        return "" if self.right(answer) else f"{len(answer.tokens)} tokens, {answer.finish}: {answer.text[:80]!r}"


def one_token(answer: Answer) -> bool:
    return answer.whole(1)


def of_the_schema(answer: Answer) -> bool:
    if answer.finish == "length":
        return True
    try:
        found = json.loads(answer.text)
    except ValueError:
        return False
    return set(found) == {"ok", "kind"} and isinstance(found["ok"], bool) and found["kind"] in ("ab", "cd")


def of_all_parameters(answer: Answer) -> bool:
    finite = all(one.logprob is not None and math.isfinite(one.logprob) for one in answer.scored)
    return 20 <= len(answer.tokens) == len(answer.scored) and 401 not in answer.tokens and finite


def odd_requests() -> list[Odd]:
    everything = dict(
        temperature=0.8, top_p=0.95, top_k=50, logprobs=20, presence_penalty=0.5, frequency_penalty=-0.3, seed=11,
        repetition_penalty=1.1, logit_bias={"400": 3.5, "401": -100}, min_tokens=20, ignore_eos=False,
    )  # fmt: skip

    def schema(of: Any, **more: Any) -> Body:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}
        return body("Once upon a time", 120, ignore_eos=False, response_format=form, **more)

    short, full = body([5, 6], 4), prompt(CONTEXT, 1)
    # What is asked with several bodies is asked at once.
    return [
        Odd("max_tokens 1", [body(prompt(10 + n, n), 1, stream=n % 2 == 0) for n in range(8)], right=one_token),
        Odd("all but one token of the context", [body(prompt(CONTEXT - 1, n), 1) for n in range(2)], right=one_token),
        Odd("every parameter", [body(prompt(30, 5), 40, **everything)] * 4, right=of_all_parameters),
        Odd("n = 8", [body([5, 6], 20, n=8, temperature=1.0, stream=False)], right=lambda found: found.whole(160)),
        Odd(
            "prompt logprobs", [body(prompt(200, 6), 2, echo=True, logprobs=3, stream=False)],
            right=lambda found: len(found.scored) == 202,
        ),
        Odd("a schema", [schema(SCHEMA, temperature=t) for t in (0, 0.9)], right=of_the_schema),
        Odd("a prompt of the context", [body(full, 1, stream=stream) for stream in (True, False)], 400),
        Odd("a prompt of twice the context", [body(2 * full, 1)], 400),
        Odd("max_tokens of the context", [short | {"max_tokens": CONTEXT}], 400),
        Odd("a token beyond the vocabulary", [short | {"prompt": [5, VOCABULARY]}], 400),
        Odd("a bias beyond the vocabulary", [short | {"logit_bias": {str(VOCABULARY): 1}}], 400),
        Odd("logprobs 21", [short | {"logprobs": 21}], 400),
        Odd("max_tokens 0", [short | {"max_tokens": 0}], 400),
        Odd("temperature NaN", [short | {"temperature": math.nan}], 400),
        Odd("a schema that is none", [schema({"type": "zzz"})], 400),
        Odd("a deadline of 20 ms", [body(prompt(30, 3), 2000, timeout=0.02, stream=False)], 408),
    ]  # fmt: skip

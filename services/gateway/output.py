"""What a client sees of one choice: its tokens decoded, cut at stop strings, split into reasoning and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.messages import TokenChunk, TokenLogprobs
from services.gateway.detokenizer import Detokenizer
from services.gateway.prepare import Job
from services.gateway.reasoning import ReasoningSplitter
from services.gateway.stops import StopStrings


@dataclass(slots=True)
class Delta:
    """What new tokens add. `finish`: stop or length, in the last one of a choice."""

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.finish or self.logprobs)

    def add(self, later: Delta) -> None:
        self.text += later.text
        self.reasoning += later.reasoning
        self.finish = later.finish
        self.tokens += later.tokens
        self.logprobs += later.logprobs


class Output:
    def __init__(self, job: Job, pieces: Sequence[bytes], *, split_reasoning: bool) -> None:
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._min_tokens = job.sampling.min_tokens
        self._detokenizer = Detokenizer(pieces)
        self._stops = StopStrings(job.stops)
        self._splitter = ReasoningSplitter(job.reasoning) if split_reasoning else None

    def push(self, chunks: Sequence[TokenChunk]) -> Delta:
        """The chunks' tokens up to a stop string; after a `finish` nothing more may be pushed."""
        delta = Delta()
        for chunk in chunks:
            self.cached_tokens = max(self.cached_tokens, chunk.cached_tokens)
            # The token that ended the output (end of sequence, stop id) counts, and is not shown.
            last = len(chunk.tokens) - (chunk.stop_token is not None)
            for i, token in enumerate(chunk.tokens):
                self.completion_tokens += 1
                if i < last and self._push_token(delta, token, chunk.logprobs[i] if chunk.logprobs else None):
                    delta.finish = "stop"
                    return self._ended(delta, "")
            if chunk.finish:
                delta.finish = chunk.finish
                return self._ended(delta, self._rest())
        return delta

    def _push_token(self, delta: Delta, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Whether a stop string is complete with this token."""
        if self._splitter is not None and self._splitter.in_reasoning:
            self.reasoning_tokens += 1
        text, met = self._detokenizer.push(token), False
        if self.completion_tokens > self._min_tokens:
            text, met = self._stops.push(text)
        self._show(delta, text)
        if logprobs is not None:
            delta.tokens.append(token)
            delta.logprobs.append(logprobs)
        return met

    def _rest(self) -> str:
        """What was held back, when no stop string came."""
        text, met = self._stops.push(self._detokenizer.flush())
        return text if met else text + self._stops.flush()

    def _show(self, delta: Delta, text: str) -> None:
        if not text:
            return
        if self._splitter is None:
            delta.text += text
            return
        reasoning, answer = self._splitter.push(text)
        delta.reasoning += reasoning
        delta.text += answer

    def _ended(self, delta: Delta, rest: str) -> Delta:
        self._show(delta, rest)
        if self._splitter is not None:
            reasoning, answer = self._splitter.flush()
            delta.reasoning += reasoning
            delta.text += answer
        return delta

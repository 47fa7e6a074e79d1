"""What a client sees of one choice: its tokens decoded, cut at stop strings, split into reasoning and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from common.messages import TokenChunk, TokenLogprobs
from services.gateway.detokenizer import Detokenizer
from services.gateway.prepare import Job
from services.gateway.reasoning import ReasoningSplitter
from services.gateway.stops import StopStrings
from services.gateway.tool_parser import Arguments, CallBegin, CallEnd, Event, Text, ToolParser, finish_reason


class Scored(NamedTuple):
    """A token and how likely it was, None for the first of a prompt.

    `offset`: where it begins in the choice's text (of a completion; an echoed prompt is part of it), not counted what
    stop strings cut off. `ending`: it ended the output, and is not part of the text.
    """

    token: int
    offset: int
    logprobs: TokenLogprobs | None
    ending: bool = False


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What a client asked to be told of the prompt."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] | None


@dataclass(slots=True)
class Delta:
    """What new tokens add.

    `finish`: stop, length or tool_calls, in the last one of a choice; `stop_reason`: the stop string or the id of
    stop_token_ids that ended it. `tokens`: filled if the client wants token ids. `prompt`: in the first one.
    """

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    stop_reason: str | int | None = None
    tokens: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    calls: list[CallBegin | Arguments] = field(default_factory=list)
    prompt: PromptReport | None = None

    def __bool__(self) -> bool:
        return bool(
            self.text or self.reasoning or self.finish or self.tokens or self.scored or self.prompt or self.calls
        )

    def add(self, later: Delta) -> None:
        self.text += later.text
        self.reasoning += later.reasoning
        self.finish, self.stop_reason = later.finish, later.stop_reason
        self.tokens += later.tokens
        self.scored += later.scored
        self.calls += later.calls
        self.prompt = self.prompt or later.prompt


class Output:
    def __init__(self, job: Job, pieces: Sequence[bytes], *, split_reasoning: bool) -> None:
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.finish: str | None = None
        self._job = job
        self._begun = False
        self._offset = len(job.echo.text) if job.echo else 0
        self._detokenizer = Detokenizer(pieces)
        self._stops = StopStrings(job.stops, include=job.include_stop)
        self._splitter = ReasoningSplitter(job.reasoning) if split_reasoning else None
        self._parser = ToolParser(job.tools.syntax, job.tools.names) if job.tools else None
        self._called = False

    def push(self, chunks: Sequence[TokenChunk]) -> Delta:
        """The chunks' tokens up to a stop string; after a `finish` nothing more may be pushed."""
        delta = Delta()
        for chunk in chunks:
            self.cached_tokens = max(self.cached_tokens, chunk.cached_tokens)
            if not self._begun:
                self._begin(delta, chunk)
            if (stop := self._push_tokens(delta, chunk)) is not None:
                delta.finish, delta.stop_reason = "stop", stop
                return self._ended(delta, "")
            if chunk.finish:
                rest, stop = self._rest()
                delta.finish = chunk.finish if stop is None else "stop"
                delta.stop_reason = self._stop_id(chunk) if stop is None else stop
                return self._ended(delta, rest)
        return delta

    def _begin(self, delta: Delta, chunk: TokenChunk) -> None:
        self._begun = True
        job, sampling = self._job, self._job.sampling
        if job.echo:
            delta.text = job.echo.text
            if sampling.logprobs is not None:
                rows = zip(job.prompt, job.echo.offsets, chunk.prompt_logprobs or (), strict=True)
                delta.scored += [Scored(*row) for row in rows]
        if job.token_ids or sampling.prompt_logprobs is not None:
            delta.prompt = PromptReport(job.prompt, chunk.prompt_logprobs)

    def _push_tokens(self, delta: Delta, chunk: TokenChunk) -> str | None:
        """The stop string that one of the chunk's tokens completes."""
        for i, token in enumerate(chunk.tokens):
            # The token that ended the output (end of sequence, stop id) counts, and is not shown.
            ending = chunk.stop_token is not None and i + 1 == len(chunk.tokens)
            if chunk.logprobs:
                delta.scored.append(Scored(token, self._offset, chunk.logprobs[i], ending))
            if self._job.token_ids:
                delta.tokens.append(token)
            self.completion_tokens += 1
            if self._splitter is not None and self._splitter.in_reasoning and not ending:
                self.reasoning_tokens += 1
            if ending and not self._job.include_stop:
                continue
            text = self._detokenizer.push(token)
            self._offset += len(text)
            text, stop = self._stops.push(text, counts=self._counts)
            self._show(delta, text)
            if stop is not None:
                return stop
        return None

    @property
    def _counts(self) -> bool:
        """Whether a stop string that the newest token completes ends the output."""
        return self.completion_tokens > self._job.sampling.min_tokens

    def _rest(self) -> tuple[str, str | None]:
        """What was held back, up to a stop string that it completes."""
        text, stop = self._stops.push(self._detokenizer.flush(), counts=self._counts)
        return (text + self._stops.flush() if stop is None else text), stop

    def _stop_id(self, chunk: TokenChunk) -> int | None:
        return chunk.stop_token if chunk.stop_token in self._job.sampling.stop_token_ids else None

    def _show(self, delta: Delta, text: str) -> None:
        if not text:
            return
        if self._splitter is None:
            self._answer(delta, text)
            return
        reasoning, answer = self._splitter.push(text)
        delta.reasoning += reasoning
        self._answer(delta, answer)

    def _answer(self, delta: Delta, text: str) -> None:
        if self._parser is None:
            delta.text += text
        else:
            self._add_events(delta, self._parser.push(text))

    def _add_events(self, delta: Delta, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Text):
                delta.text += event.text
            elif not isinstance(event, CallEnd):
                delta.calls.append(event)
                self._called = True

    def _ended(self, delta: Delta, rest: str) -> Delta:
        self._show(delta, rest)
        if self._splitter is not None:
            reasoning, answer = self._splitter.flush()
            delta.reasoning += reasoning
            self._answer(delta, answer)
        if self._parser is not None:
            self._add_events(delta, self._parser.flush())
            delta.finish = finish_reason(delta.finish, self._called)
        self.finish = delta.finish
        return delta

"""The bodies of OpenAI answers, whole and in server-sent events."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from common.errors import MoeculeError
from common.messages import TokenLogprobs
from services.gateway.output import Delta, Output, PromptReport
from services.gateway.protocol import AnyBody, ToolCall
from services.gateway.tokenizer import Tokenizer
from services.gateway.tool_parser import ToolCallDelta, call_delta, collected

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class Cached(msgspec.Struct):
    cached_tokens: int


class Reasoned(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached
    completion_tokens_details: Reasoned

    @classmethod
    def of(cls, prompt_tokens: int, outputs: Sequence[Output], cached_tokens: int | None = None) -> Usage:
        completion = sum(output.completion_tokens for output in outputs)
        return cls(
            prompt_tokens,
            completion,
            prompt_tokens + completion,
            Cached(sum(output.cached_tokens for output in outputs) if cached_tokens is None else cached_tokens),
            Reasoned(sum(output.reasoning_tokens for output in outputs)),
        )


class ChatText(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET


class AnswerMessage(ChatText):
    tool_calls: list[ToolCall] | UnsetType = UNSET


class MessageDelta(ChatText):
    """What a chunk adds to a message."""

    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class TokenScore(msgspec.Struct):
    """A token of a chat. `bytes`: its part of the text, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(TokenScore):
    top_logprobs: list[TokenScore]


class ChatLogprobs(msgspec.Struct):
    content: list[ScoredToken]


class TextLogprobs(msgspec.Struct):
    """Of a completion, a list entry a token; nothing is known of how likely a prompt's first token was."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptScore(msgspec.Struct):
    """`rank`: 1 is the likeliest; null where it lies beyond the alternatives asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptScores = list[dict[int, PromptScore] | None]


class AboutPrompt(msgspec.Struct, kw_only=True):
    """What vLLM adds of the prompt where it was asked for, `prompt_logprobs` by token id."""

    prompt_logprobs: PromptScores | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: MessageDelta | UnsetType = UNSET
    message: AnswerMessage | UnsetType = UNSET
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class TextChoice(AboutPrompt, kw_only=True):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Answer(AboutPrompt, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | UnsetType | None = UNSET


@dataclass(frozen=True)
class Wanted:
    """What a client asked to see beside the text; the numbers are alternatives, None for no logprobs."""

    logprobs: int | None
    prompt_logprobs: int | None
    token_ids: bool

    @classmethod
    def of(cls, body: AnyBody) -> Wanted:
        return cls(body.alternatives, body.prompt_logprobs, bool(body.return_token_ids))


class Style(ABC):
    """How one endpoint words its choices."""

    object: ClassVar[str]
    chunk_object: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, tokenizer: Tokenizer, wanted: Wanted) -> None:
        self._tokenizer = tokenizer
        self._wanted = wanted

    @abstractmethod
    def whole(self, index: int, delta: Delta) -> Any: ...

    @abstractmethod
    def part(self, index: int, delta: Delta, first: bool) -> Any: ...

    @abstractmethod
    def of_answer(self, index: int, delta: Delta) -> AboutPrompt:
        """What is said beside the choices."""

    def _about_prompt(self, delta: Delta) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if delta.prompt is not None:
            if self._wanted.prompt_logprobs is not None:
                fields["prompt_logprobs"] = self._prompt_scores(delta.prompt)
            if self._wanted.token_ids:
                fields["prompt_token_ids"] = delta.prompt.tokens
        return fields

    def _of_output(self, delta: Delta) -> dict[str, Any]:
        """The fields that choices of both kinds have."""
        fields: dict[str, Any] = {"finish_reason": delta.finish}
        if delta.finish is not None:
            fields["stop_reason"] = delta.stop_reason
        if self._wanted.token_ids:
            fields["token_ids"] = delta.tokens
        return fields

    def _prompt_scores(self, prompt: PromptReport) -> PromptScores:
        return [
            None if entry is None else self._prompt_score(token, entry)
            for token, entry in zip(prompt.tokens, prompt.logprobs or (), strict=True)
        ]

    def _prompt_score(self, token: int, entry: TokenLogprobs) -> dict[int, PromptScore]:
        """The prompt's own token, then the alternatives."""
        best = list(zip(entry.top_ids, entry.top_logprobs, strict=True))[: self._wanted.prompt_logprobs]
        scores = {i: PromptScore(finite(p), rank, self._name(i)) for rank, (i, p) in enumerate(best, 1)}
        own = scores.get(token) or PromptScore(finite(entry.logprob), None, self._name(token))
        return {token: own} | scores

    def _name(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


class ChatStyle(Style):
    object, chunk_object, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, index: int, delta: Delta) -> ChatChoice:
        reasoning = delta.reasoning or None
        message = AnswerMessage("assistant", delta.text, reasoning, reasoning)
        if delta.calls:
            message.tool_calls = collected(delta.calls)[1]
            message.content = delta.text if delta.text.strip() else None
        return ChatChoice(index=index, message=message, logprobs=self._logprobs(delta), **self._of_output(delta))

    def part(self, index: int, delta: Delta, first: bool) -> ChatChoice:
        text = MessageDelta(role="assistant" if first else UNSET)
        if delta.reasoning:
            text.reasoning_content = text.reasoning = delta.reasoning
        if delta.text or first:
            text.content = delta.text
        if delta.calls:
            text.tool_calls = [call_delta(event) for event in delta.calls]
        return ChatChoice(index=index, delta=text, logprobs=self._logprobs(delta), **self._of_output(delta))

    def of_answer(self, index: int, delta: Delta) -> AboutPrompt:
        """All choices have one prompt: the first tells of it."""
        return AboutPrompt(**(self._about_prompt(delta) if index == 0 else {}))

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        """Of the tokens that are text: OpenAI's chats leave the ending token out, its completions do not."""
        if self._wanted.logprobs is None:
            return None
        return ChatLogprobs([self._entry(s.token, s.logprobs) for s in delta.scored if not s.ending and s.logprobs])

    def _entry(self, token: int, entry: TokenLogprobs) -> ScoredToken:
        best = list(zip(entry.top_ids, entry.top_logprobs, strict=True))[: self._wanted.logprobs]
        top = [TokenScore(*self._score(i, value)) for i, value in best]
        return ScoredToken(*self._score(token, entry.logprob), top)

    def _score(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        data = self._tokenizer.token_bytes(token)
        return data.decode(errors="replace"), finite(logprob), list(data)


class TextStyle(Style):
    object, chunk_object, id_prefix = "text_completion", "text_completion", "cmpl"

    def whole(self, index: int, delta: Delta) -> TextChoice:
        return TextChoice(
            index=index,
            text=delta.text,
            logprobs=self._logprobs(delta),
            **self._of_output(delta),
            **self._about_prompt(delta),
        )

    def part(self, index: int, delta: Delta, first: bool) -> TextChoice:
        return self.whole(index, delta)

    def of_answer(self, index: int, delta: Delta) -> AboutPrompt:
        return AboutPrompt()

    def _logprobs(self, delta: Delta) -> TextLogprobs | None:
        if self._wanted.logprobs is None:
            return None
        scored = delta.scored
        return TextLogprobs(
            tokens=[self._name(s.token) for s in scored],
            token_logprobs=[finite(s.logprobs.logprob) if s.logprobs else None for s in scored],
            top_logprobs=[self._top(s.token, s.logprobs) if s.logprobs else None for s in scored],
            text_offset=[s.offset for s in scored],
        )

    def _top(self, token: int, entry: TokenLogprobs) -> dict[str, float]:
        """The alternatives, and the token itself. Of two with one name (parts of a character) the better keeps it."""
        best = list(zip(entry.top_ids, entry.top_logprobs, strict=True))[: self._wanted.logprobs]
        found = {self._name(i): finite(value) for i, value in reversed(best)}
        found.setdefault(self._name(token), finite(entry.logprob))
        return found


class Writer:
    """The answers of one request: id, created and model are equal in all of them."""

    def __init__(self, style: Style, request_id: str, model: str, *, include_usage: bool = False) -> None:
        self._style = style
        self._id = f"{style.id_prefix}-{request_id}"
        self._created = int(time.time())
        self._model = model
        self._usage: UnsetType | None = None if include_usage else UNSET
        self._begun: set[int] = set()

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        choices = [self._style.whole(i, delta) for i, delta in enumerate(deltas)]
        return _encode(self._answer(self._style.object, choices, usage, self._style.of_answer(0, deltas[0])))

    def part(self, index: int, delta: Delta, usage: Usage | None = None) -> bytes:
        choice = self._style.part(index, delta, index not in self._begun)
        self._begun.add(index)
        return self._event([choice], usage or self._usage, self._style.of_answer(index, delta))

    def usage(self, usage: Usage) -> bytes:
        return self._event([], usage, AboutPrompt())

    def _event(self, choices: list[Any], usage: Usage | UnsetType | None, about: AboutPrompt) -> bytes:
        return b"data: " + _encode(self._answer(self._style.chunk_object, choices, usage, about)) + b"\n\n"

    def _answer(self, kind: str, choices: list[Any], usage: Usage | UnsetType | None, about: AboutPrompt) -> Answer:
        return Answer(
            id=self._id,
            object=kind,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            prompt_logprobs=about.prompt_logprobs,
            prompt_token_ids=about.prompt_token_ids,
        )


def finite(logprob: float) -> float:
    """JSON has no -inf."""
    return max(logprob, -9999.0)


class ErrorDetails(msgspec.Struct, frozen=True):
    """`param` names the field that is wrong, `code` the kind of error."""

    message: str
    type: str
    param: str | None
    code: str


class Error(msgspec.Struct, frozen=True):
    error: ErrorDetails


def error_body(error: MoeculeError) -> bytes:
    return _encode(Error(ErrorDetails(error.message, error.type, error.param, error.code)))


def error_event(error: MoeculeError) -> bytes:
    return b"data: " + error_body(error) + b"\n\n"

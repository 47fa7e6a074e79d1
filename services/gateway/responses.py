"""The bodies of OpenAI answers, whole and in server-sent events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from common.errors import MoeculeError
from services.gateway.output import Delta, Output
from services.gateway.tokenizer import Tokenizer

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
    """A message, or what a chunk adds to one."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    logprobs: Any
    finish_reason: str | None
    delta: ChatText | UnsetType = UNSET
    message: ChatText | UnsetType = UNSET


class TextChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: Any
    finish_reason: str | None


class Answer(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | UnsetType | None = UNSET


class Style(Protocol):
    """How one endpoint words its choices."""

    object: str
    chunk_object: str
    id_prefix: str

    def whole(self, index: int, delta: Delta) -> Any: ...

    def part(self, index: int, delta: Delta, first: bool) -> Any: ...


class ChatStyle:
    object, chunk_object, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, alternatives: int | None) -> None:
        self._tokenizer = tokenizer
        self._alternatives = alternatives

    def whole(self, index: int, delta: Delta) -> ChatChoice:
        reasoning = delta.reasoning or None
        message = ChatText("assistant", delta.text, reasoning, reasoning)
        return ChatChoice(index, self._logprobs(delta), delta.finish, message=message)

    def part(self, index: int, delta: Delta, first: bool) -> ChatChoice:
        text = ChatText(role="assistant" if first else UNSET)
        if delta.reasoning:
            text.reasoning_content = text.reasoning = delta.reasoning
        if delta.text or first:
            text.content = delta.text
        return ChatChoice(index, self._logprobs(delta), delta.finish, delta=text)

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        return {"content": [self._entry(t, p) for t, p in zip(delta.tokens, delta.logprobs, strict=True)]}

    def _entry(self, token: int, entry: Any) -> dict[str, Any]:
        best = zip(entry.top_ids, entry.top_logprobs, strict=True)
        top = [self._token(i, value) for i, value in best][: self._alternatives]
        return self._token(token, entry.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}


class TextStyle:
    object, chunk_object, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, tokenizer: Tokenizer, alternatives: int | None) -> None:
        self._tokenizer = tokenizer
        self._alternatives = alternatives
        self._offsets: dict[int, int] = {}  # choice -> characters of the tokens before

    def whole(self, index: int, delta: Delta) -> TextChoice:
        return TextChoice(index, delta.text, self._logprobs(index, delta), delta.finish)

    def part(self, index: int, delta: Delta, first: bool) -> TextChoice:
        return self.whole(index, delta)

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        names = [self._name(token) for token in delta.tokens]
        offsets, at = [], self._offsets.get(index, 0)
        for name in names:
            offsets.append(at)
            at += len(name)
        self._offsets[index] = at
        return {
            "tokens": names,
            "token_logprobs": [finite(entry.logprob) for entry in delta.logprobs],
            "top_logprobs": [self._top(entry) for entry in delta.logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: Any) -> dict[str, float]:
        """Two tokens may have one name (parts of a character): the better one keeps it."""
        best = list(zip(entry.top_ids, entry.top_logprobs, strict=True))[: self._alternatives]
        return {self._name(token): finite(value) for token, value in reversed(best)}

    def _name(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


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
        return _encode(Answer(self._id, self._style.object, self._created, self._model, choices, usage))

    def part(self, index: int, delta: Delta, usage: Usage | None = None) -> bytes:
        choice = self._style.part(index, delta, index not in self._begun)
        self._begun.add(index)
        return self._event([choice], usage or self._usage)

    def usage(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def _event(self, choices: list[Any], usage: Usage | UnsetType | None) -> bytes:
        answer = Answer(self._id, self._style.chunk_object, self._created, self._model, choices, usage)
        return b"data: " + _encode(answer) + b"\n\n"


def finite(logprob: float) -> float:
    """JSON has no -inf."""
    return max(logprob, -9999.0)


def error_body(error: MoeculeError) -> bytes:
    details = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return _encode({"error": details})


def error_event(error: MoeculeError) -> bytes:
    return b"data: " + error_body(error) + b"\n\n"

"""The bodies of OpenAI requests, as they may come in; what is wrong with one is said with its path."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from common.errors import InvalidRequest

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_CHOICES = 128  # prompts of a request times n

Count = Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0)]
StopString = Annotated[str, Meta(min_length=1, max_length=512)]
Role = Literal["system", "developer", "user", "assistant"]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextPart(msgspec.Struct, frozen=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True):
    role: Role
    content: str | list[TextPart] | None = None
    tool_calls: list[Any] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


class RequestBody(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of request share. None: the client left it out, or sent null."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    cache_salt: str | None = None
    # Known and not supported yet: any other value than these is refused, never silently ignored.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionBody(RequestBody, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[TokenId]]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @property
    def output_limit(self) -> tuple[int | None, str]:
        return self.max_tokens, "max_tokens"

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class ChatBody(RequestBody, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def output_limit(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def alternatives(self) -> int | None:
        """How many alternatives a token's logprobs name; None: no logprobs are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
"""Fields that are understood and not supported yet, with the values that ask for nothing."""

Body = TypeVar("Body", CompletionBody, ChatBody)
_FIELDS = {kind: frozenset(kind.__struct_fields__) for kind in (CompletionBody, ChatBody)}
_DECODERS: dict[type, Any] = {kind: msgspec.json.Decoder(kind) for kind in (CompletionBody, ChatBody)}
_RAW = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_body(data: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    """The request, and the names of fields that are unknown and ignored. Raises InvalidRequest."""
    try:
        body: Body = _DECODERS[kind].decode(data)
        unknown = [name for name in _RAW.decode(data) if name not in _FIELDS[kind]]
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error), param_of(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    _check_supported(body)
    return body, unknown


def param_of(message: str) -> str | None:
    """`messages[0].content` of "Expected `str`, got `int` - at `$.messages[0].content`"."""
    if found := re.search(r" - at `\$\.(.+)`$", message):
        return found.group(1)
    if found := re.search(r"missing required field `(.+?)`", message):
        return found.group(1)
    return None


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """A prompt is a text or a list of token ids; the field holds one, or a list of them. Raises InvalidRequest."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(part) for part in prompt}
    if not prompt:
        raise InvalidRequest("the prompt is empty", "prompt")
    if len(kinds) > 1:
        raise InvalidRequest("the prompt mixes texts, token ids and lists of token ids: use one kind", "prompt")
    return [prompt] if kinds == {int} else prompt  # type: ignore[list-item, return-value]


def _check_supported(body: CompletionBody | ChatBody) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            raise InvalidRequest(f"{name} is not supported yet", name)
    if isinstance(body, ChatBody):
        for i, message in enumerate(body.messages):
            if message.tool_calls:
                raise InvalidRequest("tool calls are not supported yet", f"messages[{i}].tool_calls")
            if message.content is None and message.role != "assistant":
                raise InvalidRequest("content is missing", f"messages[{i}].content")
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    elif body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of is not supported yet", "best_of")

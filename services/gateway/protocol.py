"""The bodies of OpenAI requests, as they may come in; what is wrong with one is said with its path.

A field is honoured, or it is refused: what vLLM adds to OpenAI's fields means here what it means there. Four are taken
and change nothing: `user`, `store` (answers are never kept), `metadata` and `service_tier` (there is one tier).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec
from msgspec import Meta

from common.errors import InvalidRequest

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_CHOICES = 128  # prompts of a request times n
MAX_BIASES = 300

Count = Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0)]
StopString = Annotated[str, Meta(min_length=1, max_length=512)]
Alternatives = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Timeout = Annotated[float, Meta(gt=0, le=86_400)]
FunctionName = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
Role = Literal["system", "developer", "user", "assistant"]
ChatRole = Literal[Role, "tool"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# ---- messages and tools


class TextPart(msgspec.Struct, frozen=True):
    type: Literal["text"]
    text: str


class CalledFunction(msgspec.Struct, frozen=True):
    """`arguments`: the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class HasText(Protocol):
    @property
    def text(self) -> str: ...


def joined(content: str | Sequence[HasText] | None) -> str:
    """A message's content as one text."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class ChatMessage(msgspec.Struct, frozen=True):
    role: ChatRole
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        return joined(self.content)


class Function(msgspec.Struct, frozen=True):
    """`parameters`: a JSON schema of the arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: Function


class ChosenFunction(msgspec.Struct, frozen=True):
    name: FunctionName


class ChosenTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: ChosenFunction


# ---- what the output must be


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    pass


class JsonSchema(msgspec.Struct, frozen=True):
    """The schema is enforced whether `strict` is true or not."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat
SchemaOrText = dict[str, Any] | str
Choices = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of these. `grammar` is in Lark's notation, as llguidance reads it."""

    json: SchemaOrText | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


# ---- the bodies


class RequestBody(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of request share. None: the client left it out, or sent null."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MAX_BIASES)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: Alternatives | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    user: str | None = None
    cache_salt: str | None = None
    priority: Priority | None = None
    timeout: Timeout | None = None

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
    logprobs: Alternatives | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def output_limit(self) -> tuple[int | None, str]:
        return self.max_tokens, "max_tokens"

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        """How many alternatives of the prompt's tokens are shown, there or here; None: the prompt is not scored."""
        shown = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in shown if count is not None), default=None)

    @property
    def asks_of_prompt(self) -> bool:
        return bool(self.echo) or self.prompt_logprobs is not None


class ChatBody(RequestBody, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: Effort | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    service_tier: str | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None

    @property
    def output_limit(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def alternatives(self) -> int | None:
        """How many alternatives a token's logprobs name; None: no logprobs are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prompt_alternatives(self) -> int | None:
        return self.prompt_logprobs

    @property
    def asks_of_prompt(self) -> bool:
        return self.prompt_logprobs is not None


AnyBody = CompletionBody | ChatBody
Body = TypeVar("Body", CompletionBody, ChatBody)

_OLD_TOOLS = "OpenAI has replaced it by tools: leave it out"
Refusals = Mapping[str, tuple[tuple[Any, ...], str]]
"""Fields that are known and not supported: the values that ask for nothing, and what to do instead."""

REFUSED: Refusals = {
    "suffix": (("",), "the model does not fill in text before a suffix: leave it out"),
    "functions": (([],), _OLD_TOOLS),
    "function_call": (("none", "auto"), _OLD_TOOLS),
}


def refused_fields(body: msgspec.Struct, refusals: Refusals) -> Iterator[tuple[str, str]]:
    """(field, what to do instead) of each field that asks for what is not here."""
    for name, (neutral, sentence) in refusals.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            yield name, sentence


def check(body: AnyBody) -> None:
    """What no single field's type says. Raises InvalidRequest."""
    for name, sentence in refused_fields(body, REFUSED):
        raise InvalidRequest(f"{name}: {sentence}", name)
    limit, limit_name = body.output_limit
    if limit == 0 and not body.asks_of_prompt:
        other = "echo or prompt_logprobs" if isinstance(body, CompletionBody) else "prompt_logprobs"
        raise InvalidRequest(f"{limit_name} is 0: ask for at least 1 token, or for {other} as well", limit_name)
    if body.include_usage and not body.stream:
        raise InvalidRequest("stream_options need stream to be true; without it usage is always sent", "stream_options")
    if isinstance(body, ChatBody):
        _check_chat(body)
    else:
        _check_best_of(body)


def _check_chat(body: ChatBody) -> None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "a final message is continued, or a new one begun: send one of continue_final_message and "
            "add_generation_prompt",
            "continue_final_message",
        )
    for i, message in enumerate(body.messages):
        _check_message(message, f"messages[{i}]")


def _check_message(message: ChatMessage, path: str) -> None:
    if message.content is None and message.role != "assistant":
        raise InvalidRequest("content is missing", f"{path}.content")
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"only an assistant calls tools, not a {message.role}", f"{path}.tool_calls")
    if message.role == "tool" and message.tool_call_id is None:
        raise InvalidRequest("a tool's message names the call that it answers", f"{path}.tool_call_id")


def _check_best_of(body: CompletionBody) -> None:
    n = body.n or 1
    if body.best_of is None or body.best_of == n:
        return
    if body.best_of < n:
        raise InvalidRequest(f"best_of is {body.best_of}, less than n = {n}", "best_of")
    raise InvalidRequest(
        f"best_of larger than n is not supported: ask for n = {body.best_of} with logprobs and keep the best", "best_of"
    )


def param_of(message: str) -> str | None:
    """`messages[0].content` of "Expected `str`, got `int` - at `$.messages[0].content`"."""
    place = re.search(r" - at (?:`key` in )?`\$\.?(.*)`$", message)
    field = re.search(r"(?:missing required|contains unknown) field `(.+?)`", message)
    path = [found.group(1).removesuffix("[...]") for found in (place, field) if found]
    return ".".join(filter(None, path)) or None


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

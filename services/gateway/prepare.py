"""From a request's body to what the workers are sent: token ids, sampling, limits."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from common.errors import ConfigError, ContextLengthExceeded, InvalidRequest, ModelNotFound
from common.messages import Grammar, Sampling
from common.model_config import ModelConfig
from common.pages import page_hashes
from common.settings import Settings
from services.gateway.conversation import ToolUse, choice_of, format_of, offered_tools, render
from services.gateway.detokenizer import text_and_offsets
from services.gateway.protocol import MAX_CHOICES, AnyBody, ChatBody, CompletionBody, prompts_of
from services.gateway.reasoning import CLOSE, OPEN
from services.gateway.structured import constraint_of
from services.gateway.tokenizer import Tokenizer
from services.gateway.tools import tool_grammar

MESSAGE_CHARACTERS = 32  # what a message costs beside its text
LONG = 8_192  # characters or tokens: work on more is done in a thread, so that it holds up no stream
SEED_MASK = 2**63 - 1
LEAST = 1e-6  # what logits are divided by; by less they overflow
MOST_PROMPT_ENTRIES = 300_000  # prompt tokens times reported logprobs: what a message on the bus holds, with room

T = TypeVar("T")


@dataclass(frozen=True)
class Echo:
    """A prompt as it is shown before the output, and where each of its tokens begins in the text."""

    text: str
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One choice of a request.

    `reasoning`: the prompt ends inside <think>. `include_stop`: the stop string or token that ends the output is shown.
    `token_ids`: the client is told them. `grammar_field`: the body's field that asked for the grammar. `tenant` and
    `priority` are as Generate has them, `deadline` is by the gateway's clock.
    """

    index: int
    prompt: tuple[int, ...]
    page_hashes: tuple[bytes, ...]
    sampling: Sampling
    stops: tuple[str, ...] = ()
    reasoning: bool = False
    salt: str = ""
    include_stop: bool = False
    token_ids: bool = False
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    echo: Echo | None = None
    grammar_field: str = ""
    tools: ToolUse | None = None


class Preparer:
    def __init__(
        self, settings: Settings, config: ModelConfig, tokenizer: Tokenizer, most_cached: Callable[[], int]
    ) -> None:
        """`most_cached`: tokens that the largest KV cache holds, 0 if no worker is known."""
        self.name = settings.served_name
        self.weights = settings.weights
        self.config = config
        self.tokenizer = tokenizer
        self.context = config.context_within(settings.max_context)
        self._most_cached = most_cached
        self._defaults = generation_defaults(Path(settings.model))

    def pieces(self, body: AnyBody) -> Sequence[bytes]:
        """What each token shows to this client, or to the parser of its tool calls."""
        if body.skip_special_tokens is False:
            return self.tokenizer.all_pieces
        return self._tool_pieces if isinstance(body, ChatBody) and offered_tools(body) else self.tokenizer.pieces

    @cached_property
    def _tool_pieces(self) -> Sequence[bytes]:
        """The markers of tool calls are shown."""
        pieces = list(self.tokenizer.pieces)
        for marker in format_of(self.tokenizer).syntax.markers:
            if (token := self.tokenizer.token_id(marker)) is not None:
                pieces[token] = marker.encode()
        return pieces

    async def completion(self, body: CompletionBody) -> list[Job]:
        self.check_model(body.model)
        prompts = prompts_of(body)
        self._check_choices(len(prompts), body.n or 1)
        jobs: list[Job] = []
        for i, prompt in enumerate(prompts):
            tokens = await self._tokens(body, prompt)
            if not tokens:
                raise InvalidRequest("the prompt is empty", "prompt" if len(prompts) == 1 else f"prompt[{i}]")
            self.check_ids(tokens, "prompt")
            echo = await off_loop(len(tokens), self._echo, body, prompt, tokens) if body.echo else None
            reasoning = self._ends_in_reasoning(tokens)
            jobs += await self._jobs(body, tokens, "prompt", first=len(jobs), reasoning=reasoning, echo=echo)
        return jobs

    async def _tokens(self, body: CompletionBody, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        self.check_length(prompt, "prompt")
        plain = body.add_special_tokens is False
        return await off_loop(len(prompt), self.tokenizer.encode_chat if plain else self.tokenizer.encode, prompt)

    def _echo(self, body: CompletionBody, prompt: str | list[int], tokens: list[int]) -> Echo:
        """A text comes back as it was sent; what the tokenizer put before it has no place in it."""
        if not isinstance(prompt, str):
            text, offsets = text_and_offsets(tokens, self.pieces(body))
            return Echo(text, tuple(offsets))
        text, offsets = text_and_offsets(tokens, self.tokenizer.all_pieces)
        added = len(text) - len(prompt)
        return Echo(prompt, tuple(max(0, offset - added) for offset in offsets))

    def _ends_in_reasoning(self, tokens: list[int]) -> bool:
        end = b"".join(self.tokenizer.token_bytes(token) for token in tokens[-8:])
        return self.tokenizer.reasons and end.rstrip().endswith(OPEN.encode())

    async def chat(self, body: ChatBody) -> list[Job]:
        self.check_model(body.model)
        self._check_choices(1, body.n or 1)
        size = sum(len(message.text) + MESSAGE_CHARACTERS for message in body.messages)
        prompt = await off_loop(size, render, body, self.tokenizer)
        self.check_length(prompt.text, "messages")
        encode = self.tokenizer.encode if body.add_special_tokens else self.tokenizer.encode_chat
        tokens = await off_loop(len(prompt.text), encode, prompt.text)
        if not tokens:
            raise InvalidRequest("the chat template makes nothing of these messages", "messages")
        return await self._jobs(body, tokens, "messages", first=0, reasoning=prompt.reasoning, tools=prompt.tools)

    def check_length(self, text: str, param: str) -> None:
        """Tokenizing takes long for what is far too long, and the tokenizer lets no other thread run meanwhile."""
        if len(text) > self.context * self.tokenizer.longest_token:
            raise ContextLengthExceeded(
                f"the prompt of {len(text)} characters is more than the context of {self.context} tokens holds", param
            )

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ModelNotFound(f"the model {name!r} does not exist: this server has {self.name!r}", "model")

    async def _jobs(
        self, body: AnyBody, tokens: list[int], param: str, *,
        first: int, reasoning: bool, echo: Echo | None = None, tools: ToolUse | None = None,
    ) -> list[Job]:  # fmt: skip
        """The n choices of one prompt, numbered from `first`; their seeds follow on each other."""
        grammar, grammar_field = self._grammar(body, reasoning, tools)
        sampling = self._sampling(body, len(tokens), param, grammar)
        salt = body.cache_salt or ""
        scored = sampling.prompt_logprobs is not None  # such a prompt is computed anew, wherever its pages are
        hashes = [] if scored else await off_loop(len(tokens), page_hashes, tokens, self.config.fingerprint, salt)
        seed = body.seed if body.seed is not None else secrets.randbits(63)
        prompt = tuple(tokens)
        return [
            Job(
                index=i,
                prompt=prompt,
                page_hashes=tuple(hashes),
                sampling=_with_seed(sampling, seed + i),
                stops=tuple(body.stops),
                reasoning=reasoning,
                salt=salt,
                include_stop=bool(body.include_stop_str_in_output),
                token_ids=bool(body.return_token_ids),
                echo=echo,
                grammar_field=grammar_field,
                tools=tools,
            )
            for i in range(first, first + (body.n or 1))
        ]

    def _grammar(self, body: AnyBody, reasoning: bool, tools: ToolUse | None) -> tuple[Grammar | None, str]:
        """The grammar and the field that asked for it. Where the model has begun to reason it may end that first."""
        constraint = constraint_of(body)
        after = self.tokenizer.token_id(CLOSE) if reasoning else None
        if isinstance(body, ChatBody) and tools is not None:
            parallel = body.parallel_tool_calls is not False
            held = tool_grammar(
                body.tools or (), choice_of(body), tools.syntax, self.tokenizer.token_id, parallel=parallel, after=after
            )
            if held and constraint:
                raise InvalidRequest(
                    f"{constraint.field} and tools that the output is held to both say what it must be: send one",
                    constraint.field,
                )
            if held:
                return held, "tools"
        if constraint is None:
            return None, ""
        return Grammar(constraint.kind, constraint.text, after), constraint.field

    def _sampling(self, body: AnyBody, prompt_tokens: int, param: str, grammar: Grammar | None) -> Sampling:
        max_tokens = self._max_tokens(body, prompt_tokens, param)
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens is {min_tokens}, more than the {max_tokens} of output", "min_tokens")
        bias = body.logit_bias or {}
        self.check_ids(body.stop_token_ids or [], "stop_token_ids")
        self.check_ids(list(bias), "logit_bias")
        self._check_entries(body, prompt_tokens)
        defaults = self._defaults
        temperature = _first(body.temperature, defaults.temperature, 1.0)
        return Sampling(
            max_tokens=max_tokens,
            temperature=temperature if temperature >= LEAST else 0.0,
            top_p=_first(body.top_p, defaults.top_p, 1.0),
            top_k=max(0, _first(body.top_k, defaults.top_k, 0)),
            min_p=_first(body.min_p, defaults.min_p, 0.0),
            min_tokens=min_tokens,
            ignore_eos=bool(body.ignore_eos),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logprobs=body.alternatives,
            prompt_logprobs=body.prompt_alternatives,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=max(LEAST, _first(body.repetition_penalty, defaults.repetition_penalty, 1.0)),
            logit_bias=tuple(sorted(bias.items())),
            grammar=grammar,
        )

    def _max_tokens(self, body: AnyBody, prompt_tokens: int, param: str) -> int:
        left = self.context - prompt_tokens
        limit, limit_name = body.output_limit
        if left < (0 if limit == 0 else 1):
            raise ContextLengthExceeded(
                f"the prompt is {prompt_tokens} tokens: the context of {self.context} leaves no room for output", param
            )
        if limit is None:
            room = self._room(prompt_tokens)
            return min(room, self._defaults.max_new_tokens or room)
        if limit > left:
            raise ContextLengthExceeded(
                f"{limit_name} is {limit}: the prompt's {prompt_tokens} tokens leave {left} of the context of "
                f"{self.context}",
                limit_name,
            )
        return limit

    def _room(self, prompt_tokens: int) -> int:
        """What a client that names no limit gets: what context and KV cache leave. (One that does is told if that is
        less.)"""
        holds = min(self.context, self._most_cached() or self.context)
        return max(1, holds - prompt_tokens)

    def _check_choices(self, prompts: int, n: int) -> None:
        if prompts > MAX_CHOICES:
            raise InvalidRequest(f"{prompts} prompts are over the limit of {MAX_CHOICES} a request", "prompt")
        if prompts * n > MAX_CHOICES:
            raise InvalidRequest(f"{prompts} prompts times n = {n} is over the limit of {MAX_CHOICES} choices", "n")

    def _check_entries(self, body: AnyBody, prompt_tokens: int) -> None:
        alternatives = body.prompt_alternatives
        entries = 0 if alternatives is None else prompt_tokens * (alternatives + 1)
        if entries > MOST_PROMPT_ENTRIES:
            raise InvalidRequest(
                f"{prompt_tokens} prompt tokens with {alternatives} alternatives each are {entries} logprobs, over the "
                f"limit of {MOST_PROMPT_ENTRIES}: ask for fewer alternatives",
                "logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
            )

    def check_ids(self, tokens: list[int], param: str) -> None:
        if (tokens and max(tokens) >= self.config.vocab) or any(token < 0 for token in tokens):
            raise InvalidRequest(f"token ids go from 0 to {self.config.vocab - 1}", param)


class Defaults(msgspec.Struct, frozen=True):
    """What the checkpoint's authors recommend where the client says nothing."""

    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None


def generation_defaults(folder: Path) -> Defaults:
    """Of generation_config.json. Raises ConfigError."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return Defaults()
    try:
        return msgspec.convert(json.loads(path.read_text(encoding="utf-8")), Defaults)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is malformed: {error}") from None


async def off_loop(size: int, work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.to_thread(work, *arguments) if size > LONG else work(*arguments)


def _with_seed(sampling: Sampling, seed: int) -> Sampling:
    return msgspec.structs.replace(sampling, seed=seed & SEED_MASK)


def _first(*values: Any) -> Any:
    """The first that was said."""
    return next(value for value in values if value is not None)

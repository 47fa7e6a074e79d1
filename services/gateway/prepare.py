"""From a request's body to what the workers are sent: token ids, sampling, limits."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from common.errors import ConfigError, ContextLengthExceeded, InvalidRequest, ModelNotFound
from common.messages import Sampling
from common.model_config import ModelConfig
from common.pages import page_hashes
from common.settings import Settings
from services.gateway.protocol import MAX_CHOICES, ChatBody, CompletionBody, prompts_of
from services.gateway.tokenizer import Tokenizer

MESSAGE_CHARACTERS = 32  # what a message costs beside its text
LONG = 8_192  # characters or tokens: work on more is done in a thread, so that it holds up no stream
SEED_MASK = 2**63 - 1

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One choice of a request. `reasoning`: the prompt ends inside <think>."""

    index: int
    prompt: tuple[int, ...]
    page_hashes: tuple[bytes, ...]
    sampling: Sampling
    stops: tuple[str, ...] = ()
    reasoning: bool = False
    salt: str = ""


class Preparer:
    def __init__(
        self, settings: Settings, config: ModelConfig, tokenizer: Tokenizer, most_cached: Callable[[], int]
    ) -> None:
        """`most_cached`: tokens that the largest KV cache holds, 0 if no worker is known."""
        self.name = settings.served_name
        self.config = config
        self.tokenizer = tokenizer
        self.context = min(settings.max_context or config.max_positions, config.max_positions)
        self._most_cached = most_cached
        self._defaults = _generation_defaults(Path(settings.model))

    async def completion(self, body: CompletionBody) -> list[Job]:
        self.check_model(body.model)
        prompts = prompts_of(body)
        self._check_choices(len(prompts), body.n or 1)
        jobs: list[Job] = []
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                self._check_length(prompt, "prompt")
                tokens = await _off_loop(len(prompt), self.tokenizer.encode, prompt)
            else:
                tokens = prompt
            if not tokens:
                raise InvalidRequest("the prompt is empty", "prompt" if len(prompts) == 1 else f"prompt[{i}]")
            self._check_ids(tokens, "prompt")
            jobs += await self._jobs(body, tokens, "prompt", first=len(jobs), reasoning=False)
        return jobs

    async def chat(self, body: ChatBody) -> list[Job]:
        self.check_model(body.model)
        self._check_choices(1, body.n or 1)
        # Templates know no developer; what OpenAI calls so now is what it called system before.
        messages = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in body.messages]
        size = sum(len(message["content"]) + MESSAGE_CHARACTERS for message in messages)
        text = await _off_loop(size, self.tokenizer.render, messages, body.chat_template_kwargs or {})
        self._check_length(text, "messages")
        tokens = await _off_loop(len(text), self.tokenizer.encode_chat, text)
        return await self._jobs(body, tokens, "messages", first=0, reasoning=text.rstrip().endswith("<think>"))

    def _check_length(self, text: str, param: str) -> None:
        """Tokenizing takes long for what is far too long, and the tokenizer lets no other thread run meanwhile."""
        if len(text) > self.context * self.tokenizer.longest_token:
            raise ContextLengthExceeded(
                f"the prompt of {len(text)} characters is more than the context of {self.context} tokens holds", param
            )

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ModelNotFound(f"the model {name!r} does not exist: this server has {self.name!r}", "model")

    async def _jobs(
        self, body: CompletionBody | ChatBody, tokens: list[int], param: str, *, first: int, reasoning: bool
    ) -> list[Job]:
        """The n choices of one prompt, numbered from `first`; their seeds follow on each other."""
        sampling = self._sampling(body, len(tokens), param)
        salt = body.cache_salt or ""
        hashes = tuple(await _off_loop(len(tokens), page_hashes, tokens, self.config.fingerprint, salt))
        prompt, stops = tuple(tokens), tuple(body.stops)
        seed = body.seed if body.seed is not None else secrets.randbits(63)
        return [
            Job(i, prompt, hashes, _with_seed(sampling, seed + i), stops, reasoning, salt)
            for i in range(first, first + (body.n or 1))
        ]

    def _sampling(self, body: CompletionBody | ChatBody, prompt_tokens: int, param: str) -> Sampling:
        left = self.context - prompt_tokens
        limit, limit_name = body.output_limit
        if left < 1:
            raise ContextLengthExceeded(
                f"the prompt is {prompt_tokens} tokens: the context of {self.context} leaves no room for output", param
            )
        if limit is not None and limit > left:
            raise ContextLengthExceeded(
                f"{limit_name} is {limit}: the prompt's {prompt_tokens} tokens leave {left} of the context of "
                f"{self.context}",
                limit_name,
            )
        max_tokens = self._room(prompt_tokens) if limit is None else limit
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens is {min_tokens}, more than the {max_tokens} of output", "min_tokens")
        self._check_ids(body.stop_token_ids or [], "stop_token_ids")
        defaults = self._defaults
        return Sampling(
            max_tokens=max_tokens,
            temperature=_first(body.temperature, defaults.temperature),
            top_p=_first(body.top_p, defaults.top_p),
            top_k=max(0, _first(body.top_k, defaults.top_k)),
            min_p=body.min_p or 0.0,
            min_tokens=min_tokens,
            ignore_eos=bool(body.ignore_eos),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logprobs=body.alternatives,
        )

    def _room(self, prompt_tokens: int) -> int:
        """What a client that names no limit gets: what context and KV cache leave. (One that does is told if that is
        less.)"""
        holds = min(self.context, self._most_cached() or self.context)
        return max(1, holds - prompt_tokens)

    def _check_choices(self, prompts: int, n: int) -> None:
        if prompts * n > MAX_CHOICES:
            raise InvalidRequest(f"{prompts} prompts times n = {n} is over the limit of {MAX_CHOICES} choices", "n")

    def _check_ids(self, tokens: list[int], param: str) -> None:
        if (tokens and max(tokens) >= self.config.vocab) or any(token < 0 for token in tokens):
            raise InvalidRequest(f"token ids go from 0 to {self.config.vocab - 1}", param)


@dataclass(frozen=True)
class Defaults:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def _generation_defaults(folder: Path) -> Defaults:
    """What the checkpoint's authors recommend where the client says nothing."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return Defaults()
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        plain = Defaults()
        return Defaults(
            temperature=float(_first(values.get("temperature"), plain.temperature)),
            top_p=float(_first(values.get("top_p"), plain.top_p)),
            top_k=int(_first(values.get("top_k"), plain.top_k)),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is malformed: {error}") from None


async def _off_loop(size: int, work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.to_thread(work, *arguments) if size > LONG else work(*arguments)


def _with_seed(sampling: Sampling, seed: int) -> Sampling:
    return msgspec.structs.replace(sampling, seed=seed & SEED_MASK)


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value

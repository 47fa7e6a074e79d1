"""Which requests a worker can never serve, whatever its load; each is refused with the parameter that is to change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from common.errors import ContextLengthExceeded, InvalidRequest
from common.messages import Generate, Sampling

CHUNK_BYTES = 32_768  # that a message of one chunk has beside its prompt's logprobs


@dataclass(frozen=True)
class Bounds:
    vocab: int
    context: int  # tokens
    cache: int  # tokens that all KV pages hold
    message: int  # bytes

    def check(self, request: Generate) -> None:
        """Raises InvalidRequest."""
        sampling, prompt = request.sampling, request.prompt
        if not prompt:
            raise InvalidRequest("a request needs at least one prompt token", "prompt")
        for param, tokens in _token_ids(request):
            if not all(0 <= token < self.vocab for token in tokens):
                raise InvalidRequest(f"token ids must be from 0 to {self.vocab - 1}", param)
        for param, numbers in _numbers(sampling):
            if not all(map(math.isfinite, numbers)):
                raise InvalidRequest(f"{param} must be finite", param)
        for param, top in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
            if (top or 0) > self.vocab:
                raise InvalidRequest(f"there are {self.vocab} tokens to report logprobs of", param)
        self._check_lengths(len(prompt), sampling)

    def _check_lengths(self, prompt: int, sampling: Sampling) -> None:
        total = prompt + sampling.max_tokens
        if total > self.context:
            raise ContextLengthExceeded(f"prompt and output are {total} tokens, the context holds {self.context}")
        if total > self.cache:
            raise ContextLengthExceeded(
                f"prompt and output are {total} tokens, the whole KV cache holds {self.cache}: raise MOECULE_KV_PAGES"
                " (on a GPU: MOECULE_GPU_MEMORY, or MOECULE_KV_CACHE=fp8)"
            )
        if (top := sampling.prompt_logprobs) is not None:
            # They go out in one message.
            most = (self.message - CHUNK_BYTES) // logprobs_bytes(top)
            if prompt > most:
                raise InvalidRequest(
                    f"with prompt_logprobs {top} a prompt may have {most} tokens, not {prompt}: ask for fewer",
                    "prompt_logprobs",
                )


def logprobs_bytes(top: int) -> int:
    """The most that the logprobs of one token and of `top` alternatives take in a message."""
    return 16 + 14 * top


def _token_ids(request: Generate) -> Iterator[tuple[str, Iterable[int]]]:
    sampling, grammar = request.sampling, request.sampling.grammar
    yield "prompt", request.prompt
    yield "stop_token_ids", sampling.stop_token_ids
    yield "logit_bias", (token for token, _ in sampling.logit_bias)
    if grammar is not None and grammar.after is not None:
        yield "response_format", (grammar.after,)


def _numbers(sampling: Sampling) -> Iterator[tuple[str, Iterable[float]]]:
    yield "presence_penalty", (sampling.presence_penalty,)
    yield "frequency_penalty", (sampling.frequency_penalty,)
    yield "repetition_penalty", (sampling.repetition_penalty,)
    yield "logit_bias", (bias for _, bias in sampling.logit_bias)

"""Outputs that follow a grammar. It is compiled when its request is admitted; before each token it says which may come.

The grammars are llguidance's: a parser over the bytes of the tokens, whose states are found as an output gets to them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from torch import Tensor

from common.errors import InvalidRequest
from common.messages import MOST_GRAMMAR_BYTES, Grammar
from common.model_config import ModelConfig
from services.gpu_worker.planner import Sequence

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MOST_KEPT = 64  # compiled grammars
MOST_WORDS = 500  # characters of the library's explanation that a client is told
COMPILE_SECONDS = 1.5  # less than a gateway waits for an admission
COMPILE_THREADS = 2
# A lexer's states take up to 2 kB each and stay with the compiled grammar.
# And a token's mask may take some 0.1 s: every stream of the worker waits for it.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 10_000, "step_max_items": 10_000, "max_lexer_states": 20_000, "verbose_errors": False,
}  # fmt: skip
# Between JSON's tokens the library allows any number of blanks, in which a model may lose itself: here it is what
# people write, nothing, one blank, or a line break and its indentation.
JSON: JsonCompileOptions = {"whitespace_pattern": r"[ ]|\n[ ]{0,40}"}
# A model may reason without end, and never come to what its output must be.
REASONING_SHARE = 0.75  # of max_tokens, where the grammar asks for something


@dataclass
class Compiled:
    """One grammar's start. What an output's way through it has found out about the grammar serves the others too."""

    start: LLMatcher
    broken: bool = False  # some output met a limit: what is shared may be of no use any more


class Constraint:
    """One output's way through its grammar. With `after` it is free up to and with that token, which comes at the
    latest when REASONING_SHARE is used up, unless nothing has to follow it."""

    def __init__(self, compiled: Compiled, after: int | None) -> None:
        self._compiled = compiled
        self._after = after
        self.matcher = compiled.start.deep_copy()

    @property
    def free(self) -> bool:
        return self._after is not None

    @property
    def unmet(self) -> bool:
        """It is free, and something has to follow."""
        return self.free and not self.matcher.is_accepting()

    def due(self, outputs: int, max_tokens: int) -> int | None:
        """The token that has to come after so many outputs, where what follows would lack the room."""
        return self._after if self.unmet and outputs >= int(REASONING_SHARE * max_tokens) else None

    @property
    def complete(self) -> bool:
        """Nothing may follow."""
        return not self.free and self.matcher.is_stopped()

    def take(self, token: int) -> None:
        """Go on by a token that was allowed. Raises InvalidRequest where the grammar turns out too much to follow."""
        if self.free:
            if token == self._after:
                self._after = None
        elif self.matcher.is_error() or not self.matcher.consume_token(token):  # its mask met a limit
            self._compiled.broken = True
            raise _refusal(f"the output cannot follow the grammar any further: {_why(self.matcher)}")


class Grammars:
    """A worker's compiled grammars, the least recently used of MOST_KEPT gone first."""

    def __init__(self, folder: str, config: ModelConfig) -> None:
        """Takes a second where the vocabulary is large, in which no other thread runs: for the start of a worker."""
        self._tokenizer, self._missing = _load_tokenizer(Path(folder), config)
        self._known: OrderedDict[tuple[str, str], asyncio.Future[Compiled]] = OrderedDict()
        self._pool = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="grammar-compiler")

    async def constraint(self, grammar: Grammar) -> Constraint:
        """For one new output. Raises InvalidRequest that says what is wrong with the grammar."""
        compiling = self._compiling(grammar)
        try:
            # Others may wait for the same one, or ask again for what took too long this time.
            compiled = await asyncio.wait_for(asyncio.shield(compiling), COMPILE_SECONDS)
        except TimeoutError:
            raise _refusal(f"the grammar was not compiled within {COMPILE_SECONDS:g} s: simplify it") from None
        return Constraint(compiled, grammar.after)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compiling(self, grammar: Grammar) -> asyncio.Future[Compiled]:
        if self._tokenizer is None:
            raise _refusal(f"this model's output cannot follow a grammar: {self._missing}")
        if (size := len(grammar.text.encode())) > MOST_GRAMMAR_BYTES:
            raise _refusal(f"the grammar has {size} bytes: the limit is {MOST_GRAMMAR_BYTES}")
        key = grammar.kind, grammar.text
        compiling = self._known.get(key)
        if compiling is None or _is_broken(compiling):
            work = self._pool.submit(_compile, self._tokenizer, grammar)
            compiling = self._known[key] = asyncio.wrap_future(work)
        self._known.move_to_end(key)
        if len(self._known) > MOST_KEPT:
            self._known.popitem(last=False)
        return compiling


def _is_broken(compiling: asyncio.Future[Compiled]) -> bool:
    return compiling.done() and compiling.exception() is None and compiling.result().broken


def _load_tokenizer(folder: Path, config: ModelConfig) -> tuple[LLTokenizer | None, str]:
    """(the tokenizer, why there is none)"""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None, f"{path} is missing"
    try:
        return LLTokenizer(str(path.resolve()), n_vocab=config.vocab, eos_token=list(config.eos_ids)), ""
    except ValueError as error:
        return None, f"{path} cannot be used: {error}"


def _compile(tokenizer: LLTokenizer, grammar: Grammar) -> Compiled:
    """Raises InvalidRequest. The library bounds the work and lets other threads run meanwhile."""
    start = LLMatcher(tokenizer, _source(grammar), log_level=0, limits=LLParserLimits(**LIMITS))
    first = start.deep_copy()
    if not start.is_error():
        first.compute_bitmask()  # the most expensive one, which leaves what it found to those that start here
    for matcher in (start, first):
        if matcher.is_error():
            raise _refusal(f"the {grammar.kind} cannot be compiled: {_why(matcher)}")
    return Compiled(start)


def _source(grammar: Grammar) -> str:
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    try:
        return LLMatcher.grammar_from_json_schema(grammar.text, JSON)
    except ValueError as error:
        raise _refusal(f"the json_schema cannot be read: {error}") from None


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(message, "response_format")


def _why(matcher: LLMatcher) -> str:
    said = matcher.get_error().replace("<non-verbose/>", "").strip()
    if said.startswith("NoExtensionBias"):
        return "no output can ever match it"
    return said if len(said) <= MOST_WORDS else said[:MOST_WORDS] + " ..."


class Masks:
    """Which tokens each row may sample next, found in a thread while the forward pass runs."""

    def __init__(self, config: ModelConfig, threads: int) -> None:
        self._eos_ids = config.eos_ids
        self._words = -(-config.vocab // 32)
        self._threads = threads

    def begin(self, sequences: tuple[Sequence, ...], outputs: tuple[int, ...] | None = None) -> Future[Tensor] | None:
        """int32 [S, ceil(vocab / 32)] as sample() takes it, or None where no row has a grammar. The sequences' own
        constraints are in use until it is there. `outputs`: how many each has, where not what it says by now."""
        if all(s.constraint is None for s in sequences):
            return None
        if outputs is None:
            outputs = tuple(s.outputs for s in sequences)
        return self._pool.submit(self._fill, sequences, outputs)

    def close(self) -> None:
        if "_pool" in self.__dict__:
            self._pool.shutdown()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="masks")

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(self._threads)

    def _fill(self, sequences: tuple[Sequence, ...], outputs: tuple[int, ...]) -> Tensor:
        mask = np.full((len(sequences), self._words), -1, np.int32)
        # Those without pages have ended since their step was launched: nobody reads what they sample.
        held = [(row, s, s.constraint) for row, s in enumerate(sequences) if s.constraint and s.pages]
        following = [(constraint.matcher, row) for row, _, constraint in held if not constraint.free]
        if following:
            self._executor.unsafe_compute_mask_ptr(following, mask.ctypes.data, self._words * 4, len(sequences))
        for row, sequence, constraint in held:
            if (due := constraint.due(outputs[row], sequence.request.sampling.max_tokens)) is not None:
                mask[row] = 0
                mask.view(np.uint32)[row, due // 32] = 1 << due % 32
            elif ends := self._forbidden_ends(sequence, constraint, outputs[row]):
                _forbid(mask[row], ends)
        return torch.from_numpy(mask)

    def _forbidden_ends(self, sequence: Sequence, constraint: Constraint, outputs: int) -> tuple[int, ...]:
        """What would end the output too early, though its place in the grammar allows it."""
        sampling = sequence.request.sampling
        if outputs < sampling.min_tokens:
            return (*self._eos_ids, *sampling.stop_token_ids)
        return self._eos_ids if constraint.unmet or sampling.ignore_eos else ()


def _forbid(row: NDArray[np.int32], tokens: Iterable[int]) -> None:
    """Clear the bits of `tokens`, unless nothing were left."""
    left = row.view(np.uint32).copy()
    for token in tokens:
        left[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
    if left.any():
        row[:] = left.view(np.int32)

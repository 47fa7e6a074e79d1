"""From logits to tokens and their logprobs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.messages import Generate, Sampling, TokenLogprobs
from common.model_config import ModelConfig
from common.pinned import to_device
from kernels.sample import Logprobs, Penalties, SampleParams, logprobs, sample
from services.gpu_worker.grammar import Masks
from services.gpu_worker.penalties import Biases, Counts, penalised
from services.gpu_worker.planner import Sequence

if TYPE_CHECKING:
    from kernels.sample.triton import SampleScratch


@dataclass(frozen=True)
class Sampled:
    """The token of each sampled row, and logprobs of the rows that asked for them."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs]

    @staticmethod
    def of(sequences: tuple[Sequence, ...], tokens: list[int], logs: Logprobs | None) -> Sampled:
        return Sampled(tokens, {} if logs is None else logprobs_of(sequences, logs))


class Sampler:
    """One step: `begin` before its forward pass, `sample` after it.

    `add` and `forget` tell of a sequence's begin and end. What changes logits costs nothing while no sequence asks.
    """

    def __init__(self, config: ModelConfig, *, max_batch: int, threads: int, device: str = "cpu") -> None:
        self._eos_ids, self._vocab = config.eos_ids, config.vocab
        self._counts = Counts(config.vocab, max_batch, device)
        self._biases = Biases(device)
        self._masks = Masks(config, threads)
        self._adjusted: set[Sequence] = set()  # whose logits are changed before they are sampled
        self._device = device
        self._scratch: SampleScratch | None = None
        if device != "cpu":
            from kernels.sample.triton import SampleScratch

            self._scratch = SampleScratch.empty(max_batch, config.vocab, device)

    def add(self, sequence: Sequence) -> None:
        sampling = sequence.request.sampling
        if sequence.constraint is not None or sampling.logit_bias or penalised(sampling):
            self._adjusted.add(sequence)

    def forget(self, sequence: Sequence) -> None:
        if sequence in self._adjusted:
            self._adjusted.remove(sequence)
            self._counts.forget(sequence)
            self._biases.forget(sequence)

    def begin(self, sequences: tuple[Sequence, ...], outputs: tuple[int, ...] | None = None) -> Future[Tensor] | None:
        """`outputs`: how many each had when its step was launched, if that is past."""
        return self._masks.begin(sequences, outputs) if self._adjusted else None

    def plain(self, sequences: tuple[Sequence, ...]) -> bool:
        """Whether temperature, top_k, top_p, min_p and seed are all that these ask for."""
        adjusted = self._adjusted
        return not any(
            s in adjusted or s.request.sampling.logprobs is not None or s.outputs < s.request.sampling.min_tokens
            for s in sequences
        )

    def sample(
        self, sequences: tuple[Sequence, ...], logits: Tensor, out: Tensor, mask: Future[Tensor] | None
    ) -> Logprobs | None:
        """Fill `out` int64 [S] from `logits` [S, vocab], a row for each of `sequences`; what they want of logprobs.
        `mask`: what `begin` returned."""
        return self.later(sequences, logits, out)(mask)

    def later(
        self, sequences: tuple[Sequence, ...], logits: Tensor, out: Tensor
    ) -> Callable[[Future[Tensor] | None], Logprobs | None]:
        """`sample` but for the mask: how the sequences stand now is what counts."""
        if not sequences:
            return lambda mask: None
        device = self._device
        params, banned, logs = sample_params(sequences, device), self._banned(sequences), _wanted(sequences, device)
        biased, penalties = logits, None
        if self._adjusted:
            biased, penalties = self._biases.add(logits, sequences), self._counts.penalties(sequences)

        def rest(mask: Future[Tensor] | None) -> Logprobs | None:
            bits = to_device(mask.result(), device) if mask else None
            own = logs if biased is logits else None
            self.launch(biased, params, out, banned, penalties=penalties, mask=bits, logs=own)
            if logs is not None and own is None:  # of the model's own distribution
                chosen, ids, values = logprobs(logits.float(), out, logs.ids.shape[1])
                return Logprobs(logs.wanted, chosen, ids, values)
            return logs

        return rest

    def launch(
        self, logits: Tensor, params: SampleParams | None, out: Tensor, banned: tuple[Tensor, Tensor] | None = None,
        *, penalties: Penalties | None = None, mask: Tensor | None = None, logs: Logprobs | None = None,
    ) -> None:  # fmt: skip
        """kernels.sample's, with this sampler's scratch: what can be captured in a graph."""
        sample(logits, params, out, banned, penalties=penalties, mask=mask, logs=logs, scratch=self._scratch)

    def rehearse(self, dtype: torch.dtype) -> None:
        """Within kernels.ahead: all that a request may ask for, each by itself, whatever the number of rows. (What is
        asked for together compiles when it comes.)"""
        vocab, device = self._vocab, self._device
        logits = torch.zeros(1, vocab, dtype=dtype, device=device)
        out = torch.zeros(1, dtype=torch.int64, device=device)
        mask = torch.zeros(1, -(-vocab // 32), dtype=torch.int32, device=device)
        asked: tuple[dict[str, Any], ...] = (
            {}, {"logprobs": 0}, {"logprobs": 1}, {"logprobs": 2}, {"presence_penalty": 1.0},
            {"min_tokens": 1, "stop_token_ids": (0,)}, {"logit_bias": ((0, 1.0),)},
        )  # fmt: skip
        for temperature in (0.0, 1.0):
            for one in asked:
                sampling = Sampling(max_tokens=2, temperature=temperature, **one)
                request = Generate(request_id="", gateway_id="rehearsal", prompt=(0,), sampling=sampling)
                sequence = Sequence.of(request, 0)
                self.add(sequence)
                self.sample((sequence,), logits, out, None)
                self.forget(sequence)
            self.launch(logits, sample_params((sequence,), device), out, mask=mask)

    def close(self) -> None:
        self._masks.close()

    def _banned(self, sequences: tuple[Sequence, ...]) -> tuple[Tensor, Tensor] | None:
        """(row, token) pairs: what would end an output before min_tokens. (With a grammar its mask sees to that.)"""
        pairs = [
            (row, token)
            for row, s in enumerate(sequences)
            if s.outputs < s.request.sampling.min_tokens and s.constraint is None
            for token in (*self._eos_ids, *s.request.sampling.stop_token_ids)
        ]
        if not pairs:
            return None
        rows, tokens = zip(*pairs, strict=True)
        return to_device(torch.tensor(rows), self._device), to_device(torch.tensor(tokens), self._device)


def sample_params(sequences: tuple[Sequence, ...], device: str) -> SampleParams | None:
    wanted = [s.request.sampling for s in sequences]
    if all(sampling.temperature == 0 for sampling in wanted):
        return None
    return SampleParams(
        temperature=to_device(torch.tensor([s.temperature for s in wanted]), device),
        top_k=to_device(torch.tensor([s.top_k for s in wanted]), device),
        top_p=to_device(torch.tensor([s.top_p for s in wanted]), device),
        min_p=to_device(torch.tensor([s.min_p for s in wanted]), device),
        seed=to_device(torch.tensor([int64(s.seed) for s in wanted]), device),
        position=to_device(torch.tensor([len(s.tokens) for s in sequences]), device),
    )


def _wanted(sequences: tuple[Sequence, ...], device: str) -> Logprobs | None:
    counts = [s.request.sampling.logprobs for s in sequences]
    if all(count is None for count in counts):
        return None
    rows, most = len(counts), max(count or 0 for count in counts)
    return Logprobs(
        to_device(torch.tensor([-1 if count is None else count for count in counts]), device),
        torch.empty(rows, device=device),
        torch.empty(rows, most, dtype=torch.int64, device=device),
        torch.empty(rows, most, device=device),
    )


def logprobs_of(sequences: tuple[Sequence, ...], logs: Logprobs) -> dict[int, TokenLogprobs]:
    chosen, ids, values = logs.chosen.tolist(), logs.ids.tolist(), logs.values.tolist()
    return {
        row: TokenLogprobs(chosen[row], tuple(ids[row][:count]), tuple(values[row][:count]))
        for row, s in enumerate(sequences)
        if (count := s.request.sampling.logprobs) is not None
    }


def int64(seed: int) -> int:
    """Any integer, as the 64 bits that the noise is hashed from."""
    return (seed + 2**63) % 2**64 - 2**63

"""What changes a row's logits before they are sampled: penalties by what was seen before, and biases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.messages import Sampling
from common.pinned import to_device
from kernels.sample import PROMPT, Penalties
from services.gpu_worker.planner import Sequence


def penalised(sampling: Sampling) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)


@dataclass
class Slot:
    """A row of the counts: it covers the first `counted` tokens of its sequence."""

    row: int
    counted: int


class Counts:
    """How often each penalised sequence has output each token: a row of [slots, vocab] int32, which sample() keeps.

    A row that does not cover exactly the sequence's tokens (a new one, one that was preempted, a step that ran again)
    is counted anew from them; so any row may be taken from a sequence that is not in the step at hand.
    """

    def __init__(self, vocab: int, slots: int, device: str = "cpu") -> None:
        """`slots`: at least as many as rows are ever sampled in one step."""
        self._vocab, self._device = vocab, device
        self._free = list(range(slots - 1, -1, -1))
        self._slots: dict[Sequence, Slot] = {}
        self._counts: Tensor | None = None

    def penalties(self, sequences: tuple[Sequence, ...]) -> Penalties | None:
        """For sample(), which counts the token that it finds: call it once for each call of sample()."""
        rows = [row for row, s in enumerate(sequences) if penalised(s.request.sampling)]
        if not rows:
            return None
        slots = torch.full((len(sequences),), -1)
        for row in rows:
            slots[row] = self._slot(sequences[row], sequences)
        wanted, device = [s.request.sampling for s in sequences], self._device
        return Penalties(
            presence=to_device(torch.tensor([s.presence_penalty for s in wanted]), device),
            frequency=to_device(torch.tensor([s.frequency_penalty for s in wanted]), device),
            repetition=to_device(torch.tensor([s.repetition_penalty for s in wanted]), device),
            counts=self._table(),
            slot=to_device(slots, device),
        )

    def forget(self, sequence: Sequence) -> None:
        if slot := self._slots.pop(sequence, None):
            self._free.append(slot.row)

    def _slot(self, sequence: Sequence, beside: tuple[Sequence, ...]) -> int:
        slot = self._slots.get(sequence)
        if slot is None:
            if not self._free:
                self.forget(next(s for s in self._slots if s not in beside and not s.pages))  # it was preempted
            slot = self._slots[sequence] = Slot(self._free.pop(), counted=-1)
        if slot.counted != len(sequence.tokens):
            self._table()[slot.row] = to_device(self._count(sequence), self._device)
        slot.counted = len(sequence.tokens) + 1
        return slot.row

    def _count(self, sequence: Sequence) -> Tensor:
        prompt, output = torch.tensor(sequence.tokens).split([sequence.prompt_len, sequence.outputs])
        counts = torch.bincount(output, minlength=self._vocab).int()
        counts[prompt] += PROMPT  # once for each token, however often the prompt holds it
        return counts

    def _table(self) -> Tensor:
        if self._counts is None:
            # numpy's zeros are pages the kernel hands out when they are first written; torch's are written at once.
            shape = len(self._free) + len(self._slots), self._vocab
            if self._device == "cpu":
                self._counts = torch.from_numpy(np.zeros(shape, np.int32))
            else:
                self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._counts


class Biases:
    """Each sequence's logit_bias as tensors, made once."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._made: dict[Sequence, tuple[Tensor, Tensor]] = {}

    def add(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> Tensor:
        """`logits` [S, vocab] with the rows' biases: a copy where there are any, for logprobs are the model's own."""
        biased = [row for row, s in enumerate(sequences) if s.request.sampling.logit_bias]
        if not biased:
            return logits
        tokens, values = zip(*(self._of(sequences[row]) for row in biased), strict=True)
        rows = torch.tensor(biased).repeat_interleave(torch.tensor([len(part) for part in tokens]))
        rows = to_device(rows, self._device)
        return logits.float().index_put((rows, torch.cat(tokens)), torch.cat(values), accumulate=True)

    def forget(self, sequence: Sequence) -> None:
        self._made.pop(sequence, None)

    def _of(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        if sequence not in self._made:
            tokens, values = zip(*sequence.request.sampling.logit_bias, strict=True)
            self._made[sequence] = (
                to_device(torch.tensor(tokens), self._device), to_device(torch.tensor(values), self._device),
            )  # fmt: skip
        return self._made[sequence]

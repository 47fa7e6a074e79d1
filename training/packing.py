"""Batches of a fixed number of tokens: texts laid end to end, attention kept within each by their boundaries."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.data import PAD, Conversation, conversation

MAX_TEXT = 3072  # tokens; longer texts are skipped
# Prose has entropy that no model can remove: at full weight its loss would drown that of the tasks.
LOSS_WEIGHT = {"story": 0.2, "document": 0.2, "chat": 0.5}


class Batch(NamedTuple):
    ids: torch.Tensor  # [tokens] int64
    weights: torch.Tensor  # [tokens] float32: how much predicting this token counts
    positions: torch.Tensor  # [tokens] int64, from zero in each text
    boundaries: torch.Tensor  # [max texts + 1] int32, the last one repeated to a fixed length


def encode(tokenizer: Tokenizer, text: Conversation) -> tuple[list[int], list[float]]:
    """Each segment is encoded alone, as a prompt is when it is served."""
    ids: list[int] = []
    weights: list[float] = []
    weight = LOSS_WEIGHT.get(text.task, 1.0)
    encodings = tokenizer.encode_batch_fast([part for part, _ in text.segments], add_special_tokens=False)
    for encoding, (_, learnt) in zip(encodings, text.segments, strict=True):
        ids += encoding.ids
        weights += [weight if learnt else 0.0] * len(encoding.ids)
    return ids, weights


def pack(texts: Iterable[tuple[list[int], list[float]]], tokens: int, pad: int) -> Iterator[Batch]:
    """Fills batches of exactly `tokens`; the rest that no text fits into is one text of padding."""
    max_texts = tokens // 64
    ids: list[int] = []
    weights: list[float] = []
    ends = [0]
    for text_ids, text_weights in texts:
        if len(ids) + len(text_ids) > tokens or len(ends) == max_texts:
            yield _batch(ids, weights, ends, tokens, pad, max_texts)
            ids, weights, ends = [], [], [0]
        ids += text_ids
        weights += text_weights
        ends.append(len(ids))
    if ids:
        yield _batch(ids, weights, ends, tokens, pad, max_texts)


def _batch(ids: list[int], weights: list[float], ends: list[int], tokens: int, pad: int, max_texts: int) -> Batch:
    gap = tokens - len(ids)
    # Padding is cut into pieces so that no piece is longer than the longest text.
    ends = ends + list(range(ends[-1] + MAX_TEXT, tokens, MAX_TEXT))
    boundaries = np.full(max_texts + 8 + tokens // MAX_TEXT, tokens, dtype=np.int32)
    boundaries[: len(ends)] = ends
    starts = np.repeat(boundaries[:-1], np.diff(boundaries))
    return Batch(
        torch.tensor(ids + [pad] * gap),
        torch.tensor(weights + [0.0] * gap, dtype=torch.float32),
        torch.from_numpy(np.arange(tokens) - starts),
        torch.from_numpy(boundaries),
    )


class Stream(IterableDataset):
    """An endless stream of batches; each worker has a seed of its own and reads the curriculum's `longest` live."""

    def __init__(self, tokenizer_file: Path, tokens: int, seed: int) -> None:
        self.tokenizer_file, self.tokens, self.seed = str(tokenizer_file), tokens, seed
        self.longest = multiprocessing.Value("i", 200)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        rng = Random(f"{self.seed}/{info.id if info else 0}")
        tokenizer = Tokenizer.from_file(self.tokenizer_file)
        texts = (encode(tokenizer, conversation(rng, self.longest.value)) for _ in iter(int, 1))
        fitting = (text for text in texts if len(text[0]) <= MAX_TEXT)
        return pack(fitting, self.tokens, tokenizer.token_to_id(PAD))


def loader(stream: Stream, workers: int) -> DataLoader[Batch]:
    cuda = torch.cuda.is_available()
    return DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=cuda,
                      prefetch_factor=4 if workers else None)  # fmt: skip

"""What one step computes, as tensors: decode rows first (one token each), then chunks of prefill."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Prefill rows `start` to `start + rows` of the batch, all of one sequence."""

    start: int
    rows: int
    context: int  # tokens of the sequence that are in the cache once this chunk is written
    pages: Tensor  # int64 [ceil(context / PAGE)]


@dataclass(frozen=True)
class Feed:
    """Where tokens come from that the host has not seen yet: row `source` of what the step before sampled."""

    source: Tensor  # int32 [T], -1: the host knows the token
    sampled: Tensor  # int64 [S]


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    write: Tensor  # int64 [T], page * PAGE + offset of each row in the cache; on a GPU -1 pads the batch
    n_decode: int  # rows 0 to n_decode - 1 are decode rows
    block_table: Tensor  # [n_decode, max_pages], int32 on a GPU; entries past a context are any valid page
    context: Tensor  # [n_decode], length with the new token, int32 on a GPU; 0 pads the batch there
    prefill: tuple[Chunk, ...]
    logit_rows: Tensor  # int64 [S], the rows whose logits are wanted
    feed: Feed | None = None

from __future__ import annotations

import torch
from torch import Tensor


def embed(
    tokens: Tensor,  # int32 or int64 [T]
    source: Tensor,  # int32 [T]
    sampled: Tensor,  # int64 [S]
    table: Tensor,  # [vocab, hidden]
    out: Tensor,  # [T, hidden]
    ids: Tensor | None = None,  # int32 [T], out
) -> None:
    """out[t] = table[ids[t]], ids[t] = tokens[t] if source[t] < 0 else sampled[source[t]]."""
    chosen = tokens.long()
    if len(sampled):
        chosen = torch.where(source < 0, chosen, sampled[source.long().clamp_min(0)])
    out.copy_(table[chosen])
    if ids is not None:
        ids.copy_(chosen)

"""From logits to tokens and logprobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.sample import naive
from kernels.sample.naive import PROMPT, Logprobs, Penalties, SampleParams, logprobs

if TYPE_CHECKING:
    from kernels.sample.triton import SampleScratch

__all__ = ["PROMPT", "Logprobs", "Penalties", "SampleParams", "logprobs", "sample"]


def sample(
    logits: Tensor,  # float32 or bfloat16 [S, vocab], left as they are
    params: SampleParams | None,  # None: every row is greedy
    out: Tensor,  # int64 [S]
    banned: tuple[Tensor, Tensor] | None = None,  # int64 (rows, token ids), pairs that may not be sampled; row -1: none
    *,
    penalties: Penalties | None = None,
    mask: Tensor | None = None,  # int32 [S, ceil(vocab / 32)]: bit i of word w lets token 32 w + i be sampled
    logs: Logprobs | None = None,
    scratch: SampleScratch | None = None,  # of kernels.sample.triton, needed on a GPU
) -> None:
    """out = argmax(logits / temperature + gumbel noise) over the tokens that top_k, then top_p, then min_p leave."""
    if logits.is_cuda:
        from kernels.sample import triton

        assert scratch is not None, "sampling on a GPU needs scratch"
        triton.sample(logits, params, out, banned, penalties, mask, logs, scratch)
    else:
        naive.sample(logits, params, out, banned, penalties=penalties, mask=mask, logs=logs)

"""The first rows of the residual stream, of tokens that the host may not have seen yet."""

from torch import Tensor

from kernels.embed import naive

__all__ = ["embed"]


def embed(
    tokens: Tensor,  # int32 or int64 [T], what the host knew
    source: Tensor,  # int32 [T], -1, or the row of `sampled` that is meant instead
    sampled: Tensor,  # int64 [S], of the step before
    table: Tensor,  # [vocab, hidden]
    out: Tensor,  # [T, hidden]
    ids: Tensor | None = None,  # int32 [T], out: the tokens taken
) -> None:
    """out[t] = table[ids[t]], ids[t] = tokens[t] if source[t] < 0 else sampled[source[t]]."""
    if table.is_cuda:
        from kernels.embed import triton

        triton.embed(tokens, source, sampled, table, out, ids)
    else:
        naive.embed(tokens, source, sampled, table, out, ids)

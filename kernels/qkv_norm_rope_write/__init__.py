"""From the hidden state to queries, and the new rows of the latent KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.latent_cache import Fp8Latent
from kernels.qkv_norm_rope_write import naive
from kernels.qkv_norm_rope_write.naive import QkvWeights
from kernels.quant.naive import Fp8Rows

if TYPE_CHECKING:
    from kernels.qkv_norm_rope_write.triton import QkvScratch

__all__ = ["QkvWeights", "qkv_norm_rope_write"]


def qkv_norm_rope_write(
    x: Tensor | Fp8Rows,  # [T, hidden], normed
    w: QkvWeights,
    turns: Tensor,  # complex64 [T, 1, rope / 2], cos + i sin of each row's position
    write: Tensor,  # int64 [T], row of the cache to write; on a GPU -1 pads the batch
    cache: Tensor | Fp8Latent,  # [pages, PAGE, kv_lora + rope], rows `write` are written
    q: Tensor,  # [T, heads, nope + rope], out
    positions: Tensor | None = None,  # int64 [T]; then `turns` is [max_positions, rope / 2], of every position
    scratch: QkvScratch | None = None,  # needed on a GPU
) -> None:
    """cache[write] = rmsnorm(latent) | rope(key);  q = q_nope | rope(q_rope)."""
    if q.is_cuda:
        from kernels.qkv_norm_rope_write import triton

        assert scratch is not None, "projecting on a GPU needs scratch"
        triton.qkv_norm_rope_write(x, w, turns, write, cache, q, positions, scratch)
    else:
        assert isinstance(x, Tensor)
        naive.qkv_norm_rope_write(x, w, turns, write, cache, q, positions)

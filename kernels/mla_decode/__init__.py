"""Latent attention of the new tokens of each sequence over the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.latent_cache import Fp8Latent
from kernels.mla_decode import naive
from kernels.mla_decode.naive import DecodeMask, plan_decode
from kernels.quant import Fp8Rows

if TYPE_CHECKING:
    from kernels.mla_decode.plan import DecodePlan

__all__ = ["DecodeMask", "mla_decode", "plan_decode"]


def mla_decode(
    q: Tensor,  # [n, heads, nope + rope]
    w_uk: Tensor,  # [heads, nope, kv_lora]
    w_uv: Tensor,  # [heads, kv_lora, v_dim]
    cache: Tensor | Fp8Latent,  # [pages, PAGE, kv_lora + rope]; in 8 bits on a GPU alone
    block_table: Tensor,  # [n, max_pages], int32 on a GPU; entries past a context are any valid page
    context: Tensor,  # [n], lengths with the new token; on a GPU int32, and 0 for a row that pads the batch
    step: DecodeMask | DecodePlan,  # of these contexts: `plan_decode`'s; on a GPU that of kernels.mla_decode.triton
    scale: float,
    out: Tensor | Fp8Rows,  # [n, heads, v_dim]; in 8 bits, on a GPU alone and of v_dim GROUP, [n, heads * v_dim]
) -> None:
    """out = softmax(scale * (q_nope W_uk . latent + q_rope . key)) latent W_uv"""
    if isinstance(step, DecodeMask):
        if not isinstance(cache, Tensor) or not isinstance(out, Tensor):
            raise TypeError("an fp8 cache, or sums in 8 bits, need a GPU")
        naive.mla_decode(q, w_uk, w_uv, cache, block_table, step, scale, out)
    else:
        from kernels.mla_decode import triton

        triton.mla_decode(q, w_uk, w_uv, cache, block_table, context, step, scale, out)

"""Latent attention of chunks of prompts over the paged cache."""

from torch import Tensor

from kernels.latent_cache import Fp8Latent
from kernels.mla_prefill import naive
from kernels.mla_prefill.plan import MOST_CHUNKS, PrefillPlan, PrefillScratch

__all__ = ["MOST_CHUNKS", "PrefillPlan", "PrefillScratch", "load_expansions", "mla_prefill"]


def mla_prefill(
    q: Tensor,  # [R, heads, nope + rope], the rows of all chunks
    w_uk: Tensor,  # [heads, nope, kv_lora]
    w_uv: Tensor,  # [heads, kv_lora, v_dim]
    cache: Tensor | Fp8Latent,  # [pages, PAGE, kv_lora + rope]
    plan: PrefillPlan,
    scale: float,
    out: Tensor,  # [R, heads, v_dim]
    scratch: PrefillScratch | None = None,  # on a GPU
) -> None:
    """Causal attention of each chunk over its context, with keys and values expanded from the latents.

    On a GPU w_uk and w_uv are the two parts of the checkpoint's kv_b_proj, [heads, nope + v_dim, kv_lora], as views.
    """
    if q.is_cuda:
        from kernels.mla_prefill import triton

        assert scratch is not None
        triton.mla_prefill(q, w_uk, w_uv, cache, plan, scale, out, scratch)
    else:
        naive.mla_prefill(q, w_uk, w_uv, cache, plan, scale, out)


def load_expansions(w_uk: Tensor, w_uv: Tensor, scratch: PrefillScratch) -> None:
    """What the latents' expansion would load, on a GPU, once it meets a length of context that fits into `scratch`."""
    from kernels.mla_prefill import triton

    triton.load_expansions(w_uk, w_uv, scratch)

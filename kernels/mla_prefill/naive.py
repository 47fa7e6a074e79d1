from __future__ import annotations

import torch
from torch import Tensor

from kernels.latent_cache import Fp8Latent
from kernels.mla_prefill.plan import PrefillPlan


def mla_prefill(
    q: Tensor,  # [R, heads, nope + rope], the rows of all chunks
    w_uk: Tensor,  # [heads, nope, kv_lora]
    w_uv: Tensor,  # [heads, kv_lora, v_dim]
    cache: Tensor | Fp8Latent,  # [pages, PAGE, kv_lora + rope]
    plan: PrefillPlan,
    scale: float,
    out: Tensor,  # [R, heads, v_dim]
) -> None:
    """Causal attention with keys and values expanded from the latents: with many queries a latent that is cheaper."""
    starts = plan.cu_rows.tolist()
    for i, context in enumerate(plan.contexts.tolist()):
        rows = slice(starts[i], starts[i + 1])
        held = _rows(cache, plan.block_table[i])[:context]
        _one_chunk(q[rows], w_uk, w_uv, held, scale, out[rows])


def _rows(cache: Tensor | Fp8Latent, pages: Tensor) -> Tensor:
    """[tokens, kv_lora + rope]"""
    if isinstance(cache, Fp8Latent):
        return Fp8Latent(cache.data[pages], cache.scale[pages], cache.rope[pages]).rows().flatten(0, 1)
    return cache[pages].view(-1, cache.shape[2])


def _one_chunk(q: Tensor, w_uk: Tensor, w_uv: Tensor, held: Tensor, scale: float, out: Tensor) -> None:
    rows, heads = q.shape[:2]
    context, kv_lora = len(held), w_uk.shape[2]
    latent = held[:, :kv_lora]
    keys = torch.cat((torch.matmul(w_uk, latent.T), held[:, kv_lora:].T.expand(heads, -1, -1)), 1)  # [heads, n+r, L]
    values = torch.matmul(latent, w_uv)  # [heads, L, v_dim]
    hidden = torch.ones(rows, context, dtype=torch.bool, device=q.device)
    hidden.triu_(context - rows + 1)  # the future of each row
    scores = torch.bmm(q.transpose(0, 1), keys).mul_(scale).masked_fill_(hidden, -torch.inf)  # [heads, R, L]
    out.copy_(torch.bmm(scores.softmax(2), values).transpose(0, 1))

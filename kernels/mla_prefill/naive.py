from __future__ import annotations

import torch
from torch import Tensor


def mla_prefill(
    q: Tensor,  # [R, heads, nope + rope], the last R tokens of the context
    w_uk: Tensor,  # [heads, nope, kv_lora]
    w_uv: Tensor,  # [heads, kv_lora, v_dim]
    cache: Tensor,  # [pages, PAGE, kv_lora + rope]
    pages: Tensor,  # int64 [ceil(context / PAGE)]
    context: int,
    scale: float,
    out: Tensor,  # [R, heads, v_dim]
) -> None:
    """Causal attention with keys and values expanded from the latents: with many queries a latent that is cheaper."""
    rows, heads = q.shape[:2]
    kv_lora = w_uk.shape[2]
    held = cache[pages].view(-1, cache.shape[2])[:context]  # [L, kv_lora + rope]
    latent = held[:, :kv_lora]
    keys = torch.cat((torch.matmul(w_uk, latent.T), held[:, kv_lora:].T.expand(heads, -1, -1)), 1)  # [heads, n+r, L]
    values = torch.matmul(latent, w_uv)  # [heads, L, v_dim]
    hidden = torch.ones(rows, context, dtype=torch.bool).triu_(context - rows + 1)  # the future of each row
    scores = torch.bmm(q.transpose(0, 1), keys).mul_(scale).masked_fill_(hidden, -torch.inf)  # [heads, R, L]
    out.copy_(torch.bmm(scores.softmax(2), values).transpose(0, 1))

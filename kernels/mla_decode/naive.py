from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mla_decode(
    q: Tensor,  # [n, heads, nope + rope]
    w_uk: Tensor,  # [heads, nope, kv_lora]
    w_uv: Tensor,  # [heads, kv_lora, v_dim]
    cache: Tensor,  # [pages, PAGE, kv_lora + rope]
    block_table: Tensor,  # int64 [n, max_pages]
    mask: Tensor,  # [n, 1, max_pages * PAGE], 0 within the context and -inf past it
    scale: float,
    out: Tensor,  # [n, heads, v_dim]
) -> None:
    """out = softmax(scale * (q_nope W_uk . latent + q_rope . key)) latent W_uv: keys and values are never expanded."""
    n = len(q)
    nope, kv_lora = w_uk.shape[1:]
    # An embedding look-up copies whole pages, twice as fast as indexing does.
    rows = F.embedding(block_table, cache.view(len(cache), -1)).view(n, -1, cache.shape[2])  # [n, L, kv_lora + rope]
    absorbed = torch.cat((torch.bmm(q[..., :nope].transpose(0, 1), w_uk).transpose(0, 1), q[..., nope:]), 2)
    scores = torch.baddbmm(mask, absorbed, rows.transpose(1, 2), alpha=scale)  # [n, heads, L]
    latent = torch.bmm(scores.softmax(2), rows[..., :kv_lora])  # [n, heads, kv_lora]
    out.copy_(torch.bmm(latent.transpose(0, 1), w_uv).transpose(0, 1))

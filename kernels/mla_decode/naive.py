from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.pages import PAGE
from kernels.latent_cache import Fp8Latent


@dataclass(frozen=True)
class DecodeMask:
    """What the layers of a step share on a CPU, where on a GPU they share a DecodePlan."""

    hidden: Tensor  # [n, 1, max_pages * PAGE], 0 within each context and -inf past it


def plan_decode(context: Tensor, max_pages: int) -> DecodeMask:
    """`context` [n], lengths with the new token, at least 1; `max_pages`: columns of the block table."""
    places = torch.arange(max_pages * PAGE)
    hidden = torch.zeros(len(context), len(places))
    return DecodeMask(hidden.masked_fill_(places >= context.unsqueeze(1), -torch.inf).unsqueeze(1))


def mla_decode(
    q: Tensor,  # [n, heads, nope + rope]
    w_uk: Tensor,  # [heads, nope, kv_lora]
    w_uv: Tensor,  # [heads, kv_lora, v_dim]
    cache: Tensor,  # [pages, PAGE, kv_lora + rope]
    block_table: Tensor,  # int64 [n, max_pages]
    step: DecodeMask,
    scale: float,
    out: Tensor,  # [n, heads, v_dim]
) -> None:
    """out = softmax(scale * (q_nope W_uk . latent + q_rope . key)) latent W_uv: keys and values are never expanded."""
    n = len(q)
    nope, kv_lora = w_uk.shape[1:]
    # An embedding look-up copies whole pages, twice as fast as indexing does.
    rows = F.embedding(block_table, cache.view(len(cache), -1))  # [n, max_pages, ...]
    rows = rows.view(n, rows.shape[1] * PAGE, cache.shape[2])  # [n, L, kv_lora + rope]
    absorbed = torch.cat((torch.bmm(q[..., :nope].transpose(0, 1), w_uk).transpose(0, 1), q[..., nope:]), 2)
    scores = torch.baddbmm(step.hidden, absorbed, rows.transpose(1, 2), alpha=scale)  # [n, heads, L]
    latent = torch.bmm(scores.softmax(2), rows[..., :kv_lora])  # [n, heads, kv_lora]
    out.copy_(torch.bmm(latent.transpose(0, 1), w_uv).transpose(0, 1))


def attend(
    q: Tensor,  # [n, q_tokens, heads, kv_lora + rope], absorbed
    cache: Tensor | Fp8Latent,  # [pages, PAGE, kv_lora + rope]
    block_table: Tensor,  # int32 [n, max_pages]
    context: Tensor,  # int32 [n], the tokens of this step included
    scale: float,
    out: Tensor,  # [n, q_tokens, heads, kv_lora]
) -> None:
    """out = softmax(scale * q . (latent | key)) latent in float32; of m query tokens, number j sees
    context - (m - 1 - j). Zeros where nothing is seen."""
    held = cache.rows() if isinstance(cache, Fp8Latent) else cache.float()
    m, kv_lora = q.shape[1], out.shape[3]
    ahead = torch.arange(m - 1, -1, -1, device=q.device)
    for one, pages, length, result in zip(q.float(), block_table.long(), context.tolist(), out, strict=True):
        rows = held[pages[: -(-length // PAGE)]].flatten(0, 1)[:length]  # [length, kv_lora + rope]
        scores = scale * one @ rows.T  # [m, heads, length]
        seen = torch.arange(length, device=q.device) < length - ahead[:, None]  # [m, length]
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(2).nan_to_num()
        result.copy_(weights @ rows[:, :kv_lora])

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.combine_norm.naive import inverse_rms

LATENT_EPS = 1e-6  # of the two inner norms, whatever rms_norm_eps says


@dataclass(frozen=True)
class QkvWeights:
    """Rotary dimensions lie in pairs (0, 1), (2, 3) ... `a`: the columns are kv_lora latent, rope key, then q_lora,
    or the queries themselves where there is no q_lora (`b` and `q_norm` are None then)."""

    a: Tensor  # [hidden, kv_lora + rope + (q_lora or heads * (nope + rope))]
    a_bias: Tensor | None
    kv_norm: Tensor  # [kv_lora]
    q_norm: Tensor | None  # [q_lora]
    b: Tensor | None  # [q_lora, heads * (nope + rope)]


def qkv_norm_rope_write(
    x: Tensor,  # [T, hidden], normed
    w: QkvWeights,
    turns: Tensor,  # complex64 [T, 1, rope / 2], cos + i sin of each row's position
    write: Tensor,  # int64 [T], row of the cache to write
    cache: Tensor,  # [pages, PAGE, kv_lora + rope], rows `write` are written
    q: Tensor,  # [T, heads, nope + rope], out
) -> None:
    """cache[write] = rmsnorm(latent) | rope(key);  q = q_nope | rope(q_rope).

    rope multiplies each pair, as a complex number, by its turn: equal to transformers' rotate_half on de-interleaved
    dimensions up to one permutation of both queries and keys, which leaves their products alone.
    """
    kv_lora, width = len(w.kv_norm), cache.shape[2]
    rope = width - kv_lora
    a = torch.mm(x, w.a) if w.a_bias is None else torch.addmm(w.a_bias, x, w.a)
    row, queries = a.split((width, a.shape[1] - width), 1)
    latent, key = row.split((kv_lora, rope), 1)
    latent *= inverse_rms(latent, LATENT_EPS)
    latent *= w.kv_norm
    _rotate(key.unsqueeze(1), turns)
    cache.view(-1, width).index_copy_(0, write, row)
    if w.b is None or w.q_norm is None:
        q.copy_(queries.view_as(q))
    else:
        queries *= inverse_rms(queries, LATENT_EPS)
        queries *= w.q_norm
        torch.mm(queries, w.b, out=q.view(len(q), -1))
    _rotate(q[:, :, q.shape[2] - rope :], turns)


def _rotate(x: Tensor, turns: Tensor) -> None:
    """x [T, heads, rope], turned in place."""
    torch.view_as_complex(x.unflatten(2, (-1, 2))).mul_(turns)

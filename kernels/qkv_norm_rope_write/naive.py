from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.combine_norm.naive import inverse_rms
from kernels.latent_cache import Fp8Latent
from kernels.quant.naive import Fp8Blocks, Fp8Rows, quantise_rows

LATENT_EPS = 1e-6  # of the two inner norms, whatever rms_norm_eps says


@dataclass(frozen=True)
class QkvWeights:
    """Rotary dimensions lie in pairs (0, 1), (2, 3) ... `a`: the columns are kv_lora latent, rope key, then q_lora,
    or the queries themselves where there is no q_lora (`b` and `q_norm` are None then)."""

    a: Tensor | Fp8Blocks  # [hidden, kv_lora + rope + (q_lora or heads * (nope + rope))]
    a_bias: Tensor | None
    kv_norm: Tensor  # [kv_lora]
    q_norm: Tensor | None  # [q_lora]
    b: Tensor | Fp8Blocks | None  # [q_lora, heads * (nope + rope)]
    queries_first: bool = False
    """The columns of `a` are q_lora, latent, key: so both parts start at a block of 128 where the weights have such."""

    def split(self, a: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """([T, width] latent and key, [T, rest] of the queries), views of `a`."""
        if self.queries_first:
            queries, row = a.split((a.shape[1] - width, width), 1)
        else:
            row, queries = a.split((width, a.shape[1] - width), 1)
        return row, queries


def qkv_norm_rope_write(
    x: Tensor,  # [T, hidden], normed
    w: QkvWeights,
    turns: Tensor,  # complex64 [T, 1, rope / 2], cos + i sin of each row's position
    write: Tensor,  # int64 [T], row of the cache to write
    cache: Tensor | Fp8Latent,  # [pages, PAGE, kv_lora + rope], rows `write` are written
    q: Tensor,  # [T, heads, nope + rope], out
    positions: Tensor | None = None,  # int64 [T]; then `turns` is [max_positions, rope / 2], of every position
) -> None:
    """cache[write] = rmsnorm(latent) | rope(key);  q = q_nope | rope(q_rope).

    rope multiplies each pair, as a complex number, by its turn: equal to transformers' rotate_half on de-interleaved
    dimensions up to one permutation of both queries and keys, which leaves their products alone.
    """
    assert isinstance(w.a, Tensor) and not isinstance(w.b, Fp8Blocks), "products of 8 bits are the GPU's"
    turns = of_rows(turns, positions)
    rope = 2 * turns.shape[2]
    a = torch.mm(x, w.a) if w.a_bias is None else torch.addmm(w.a_bias, x, w.a)
    row, queries = w.split(a, len(w.kv_norm) + rope)
    if w.b is None:
        norm_rope_write(row, queries, w, turns, write, cache, q)
        return
    norm_rope_write(row, queries, w, turns, write, cache, queries)
    torch.mm(queries, w.b, out=q.view(len(q), -1))
    _rotate(q[:, :, q.shape[2] - rope :], turns)


def norm_rope_write(
    row: Tensor,  # [T, kv_lora + rope], with the bias; overwritten, as is `queries`
    queries: Tensor,  # [T, q_lora or heads * (nope + rope)]
    w: QkvWeights,
    turns: Tensor,  # complex64 [T, 1, rope / 2]
    write: Tensor,
    cache: Tensor | Fp8Latent,
    q: Tensor | Fp8Rows,  # [T, q_lora], the normed input of `b`, or [T, heads, nope + rope], the queries; out
) -> None:
    """After the first product: cache[write] = rmsnorm(latent) | rope(key); q = rmsnorm or rope of the queries."""
    kv_lora = len(w.kv_norm)
    latent, key = row.split((kv_lora, row.shape[1] - kv_lora), 1)
    latent *= inverse_rms(latent, LATENT_EPS)
    latent *= w.kv_norm
    _rotate(key.unsqueeze(1), turns)
    _write(row, write, cache)
    if w.q_norm is None:
        assert isinstance(q, Tensor)
        q.copy_(queries.view_as(q))
        _rotate(q[:, :, q.shape[2] - key.shape[1] :], turns)
        return
    queries *= inverse_rms(queries, LATENT_EPS)
    queries *= w.q_norm
    if isinstance(q, Fp8Rows):
        quantise_rows(queries, q)
    elif q is not queries:
        q.copy_(queries)


def rope_q(
    q: Tensor,  # [T, heads, nope + rope]
    turns: Tensor,  # complex64 [T, 1, rope / 2]
    out: Tensor,  # [T, heads, rope], any strides: q[:, :, nope:], or where the absorbed queries end
) -> None:
    """out = rope of the queries' last columns."""
    out.copy_(q[:, :, q.shape[2] - out.shape[2] :])
    _rotate(out, turns)


def of_rows(turns: Tensor, positions: Tensor | None) -> Tensor:
    """[T, 1, rope / 2]"""
    return turns if positions is None else turns[positions].unsqueeze(1)


def _write(row: Tensor, write: Tensor, cache: Tensor | Fp8Latent) -> None:
    if isinstance(cache, Tensor):
        cache.view(-1, cache.shape[2]).index_copy_(0, write, row)
        return
    page, place = write // cache.data.shape[1], write % cache.data.shape[1]
    kv_lora = cache.data.shape[2]
    coded = Fp8Rows.empty(len(row), kv_lora, row.device, cache.data.dtype)
    quantise_rows(row[:, :kv_lora], coded)
    # By bytes: not every build of torch copies 8-bit floats by index.
    cache.data.view(torch.uint8)[page, place] = coded.data.view(torch.uint8)
    cache.scale[page, place] = coded.scale
    cache.rope[page, place] = row[:, kv_lora:].to(cache.rope.dtype)


def _rotate(x: Tensor, turns: Tensor) -> None:
    """x [T, heads, rope], turned in place."""
    torch.view_as_complex(x.unflatten(2, (-1, 2))).mul_(turns)

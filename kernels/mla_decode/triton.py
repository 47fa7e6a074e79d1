from __future__ import annotations

import math

import torch
from torch import Tensor

from common.pages import PAGE
from kernels.latent_cache import Fp8Latent
from kernels.mla_decode.attend import attention, join
from kernels.mla_decode.plan import DecodePlan, plan_decode
from kernels.mla_decode.projections import per_head
from kernels.quant.naive import GROUP, Fp8Rows
from kernels.sizes import cdiv, next_power_of_2
from kernels.target import INTERPRETED, current, measured_tile, overlap, overlaps

__all__ = ["attend", "candidates", "decode_plan", "mla_decode", "plan_decode", "project", "projection_candidates"]


_SHORT = 1024  # tokens of context a request, up to which a tile may be another
_NO_BOUND = 1 << 30


def shape_key(rows: int, kv_lora: int, rope: int, fp8: bool, max_context: int = _NO_BOUND) -> str:
    """The name of a shape in tiles.json; its buckets are numbers of requests."""
    kind = f"{rows} rows, {kv_lora}+{rope}, {'fp8' if fp8 else 'bf16'}"
    return f"{kind}, short" if max_context <= _SHORT else kind


def tile_rule(
    requests: int, rows: int, kv_lora: int, rope: int, fp8: bool, max_context: int = _NO_BOUND
) -> dict[str, int]:
    """`rows` query rows a program; a piece of a request has at least `least` pages, and costs as much as `setup` more;
    to join pieces costs as much as `join` pages.

    The rest is for the portable body: `tokens` of a page at a time.
    """
    arch = current().arch
    height = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if height == 64 and requests * max_context <= 8 * _SHORT:
        height = 16  # little to read: what counts is that all processors take part
    tile = {"rows": height, "setup": 2, "least": 1, "join": 8 if height == 64 else 3, "programs": 1}
    body = {"hopper": int(arch == "sm_90" and not INTERPRETED), "tokens": 64, "warps": 8, "stages": 2}
    if arch == "gfx950":
        body |= {"tokens": 32, "warps": 4, "stages": 1}
    if arch == "gfx942":
        body |= {"tokens": 16, "warps": 4, "stages": 1}
    measured = measured_tile(__file__, shape_key(rows, kv_lora, rope, fp8, max_context), requests)
    return measured or tile | body


def candidates(rows: int) -> list[dict[str, int]]:
    body = {"hopper": 1, "tokens": 64, "warps": 8, "stages": 2}
    heights = [16] if rows <= 16 else [16, 32] if rows <= 32 else [16, 32, 64]
    return [
        {"rows": height, "setup": setup, "least": least, "join": join, "programs": 1} | body
        for height in heights
        for setup in (1, 2, 4)
        for least in (1, 2)
        for join in (2, 8)
    ]


def decode_plan(
    requests: int, q_tokens: int, heads: int, kv_lora: int, rope: int, dtype: torch.dtype, device: torch.device | str,
    *, fp8: bool = False, max_context: int = _NO_BOUND, tile: dict[str, int] | None = None,
    piece: torch.dtype | None = None,
) -> DecodePlan:  # fmt: skip
    """A plan for up to so many requests, to be filled by `plan_decode` in every step. `max_context`, where it is known,
    chooses a faster tile for short contexts; longer ones are right all the same."""
    tile = tile or tile_rule(requests, q_tokens * heads, kv_lora, rope, fp8, max_context)
    return DecodePlan.empty(requests, q_tokens, heads, kv_lora, rope, tile, current().processors, device, dtype, piece)


def attend(
    q: Tensor,  # [n, q_tokens, heads, kv_lora + rope], absorbed
    cache: Tensor | Fp8Latent,  # [pages, PAGE, kv_lora + rope]; numbers everywhere, also past a context
    block_table: Tensor,  # int32 [n, max_pages]
    context: Tensor,  # int32 [n], the tokens of this step included; the plan's
    plan: DecodePlan,
    scale: float,
    out: Tensor,  # [n, q_tokens, heads, kv_lora]
) -> None:
    """out = softmax(scale * q . (latent | key)) latent; of m query tokens, number j sees context - (m - 1 - j)."""
    n, q_tokens, heads, width = q.shape
    if not n:
        return
    kv_lora, rows, tile, fp8 = out.shape[3], q_tokens * heads, plan.tile, isinstance(cache, Fp8Latent)
    pdl = overlaps()
    if isinstance(cache, Fp8Latent):
        latents, keys, scales, scale_pitch = cache.data, cache.rope, cache.scale, cache.scale.stride(0)
    else:
        latents, keys, scales, scale_pitch = cache[..., :kv_lora], cache[..., kv_lora:], None, 0
    grid = (cdiv(rows, tile["rows"]), plan.parts)
    shared = block_table, context, plan.begin, out, plan.pieces, plan.lse, scale * math.log2(math.e), rows, heads
    sizes = kv_lora, width - kv_lora, tile["rows"]
    if tile["hopper"]:
        from kernels.mla_decode import hopper

        hopper.attend(q, latents, keys, scales, scale_pitch, shared, block_table.stride(0), sizes, grid)
    else:
        attention[grid](
            q, latents, keys, scales, *shared, block_table.stride(0), latents.stride(0), latents.stride(1),
            keys.stride(0), keys.stride(1), scale_pitch, *sizes, tile["tokens"], tile["rows"] < 64, fp8, PAGE, pdl,
            tile["stages"], num_warps=tile["warps"], **overlap(pdl),
        )  # fmt: skip
    most, programs = min(n, plan.parts) * rows, 8 * current().processors
    deep = 32 if most <= 2 * current().processors else 16  # few rows may have many pieces
    join_rows = max(1, 16384 // (deep * kv_lora))
    join[(min(programs, cdiv(most, join_rows)),)](
        plan.joins, plan.count, plan.pieces, plan.lse, out, rows, plan.lse.shape[1], kv_lora, join_rows, deep, pdl,
        num_warps=4, **overlap(pdl),
    )  # fmt: skip


def mla_decode(
    q: Tensor,  # [n, heads, nope + rope]
    w_uk: Tensor,  # [heads, nope, kv_lora]
    w_uv: Tensor,  # [heads, kv_lora, v_dim]
    cache: Tensor | Fp8Latent,
    block_table: Tensor,  # int32 [n, max_pages]
    context: Tensor,  # int32 [n]
    plan: DecodePlan,
    scale: float,
    out: Tensor | Fp8Rows,  # [n, heads, v_dim]; in 8 bits [n, heads * v_dim]
) -> None:
    """Of n / q_tokens requests, where the plan is for several query tokens each."""
    n, heads = q.shape[:2]
    absorbed, latent = plan.absorbed.flatten(0, 1)[:n], plan.latent.flatten(0, 1)[:n]
    project(q, w_uk, absorbed)
    requests = -1, plan.absorbed.shape[1], heads
    attend(
        absorbed.unflatten(0, requests[:2]), cache, block_table, context, plan, scale, latent.unflatten(0, requests[:2])
    )
    project(latent, w_uv, out)


def project(x: Tensor, w: Tensor, out: Tensor | Fp8Rows, tile: dict[str, int] | None = None) -> None:
    """out[t, h] = x[t, h, :k] w[h], then what x holds past its first k columns. In 8 bits, where `codes_heads`, with
    the codes of `quantise_rows`."""
    heads, k, n = w.shape
    tile = tile or projection_rule(len(x), heads, k, n, isinstance(out, Fp8Rows))
    per_head(x, w, out, tile, overlaps())


def codes_heads(k: int, n: int) -> bool:
    """Whether a projection can give 8 bits: a head's columns are a group, and a processor has room for its weights
    beside some tokens."""
    return n == GROUP and 2 * next_power_of_2(k) * (n + 32) <= current().shared


def projection_rule(tokens: int, heads: int, k: int, n: int, coded: bool = False) -> dict[str, int]:
    """All of a program's weights are on their way at once: 16 to 32 KB, several programs a processor; all of a head's
    where the result is coded."""
    bn = max(16, min(128, 16384 // next_power_of_2(k)))
    while bn > 16 and heads * cdiv(n, bn) < 256:
        bn //= 2
    rule = {"bm": _token_tile(tokens, k), "bn": bn, "warps": 4}
    if coded:
        rule |= {"bn": n, "warps": 8}
    return measured_tile(__file__, projection_key(heads, k, n, coded), tokens) or rule


def _token_tile(tokens: int, k: int) -> int:
    """16 to 64, and small enough beside the weights."""
    return max(16, min(64, 16384 // next_power_of_2(k), next_power_of_2(tokens)))


def projection_key(heads: int, k: int, n: int, coded: bool = False) -> str:
    return f"per head{' to fp8' if coded else ''} {heads}x{k}x{n}"


def projection_candidates(tokens: int, k: int, coded: bool = False) -> list[dict[str, int]]:
    if coded:
        heights = [height for height in (16, 32, 64) if height <= max(16, next_power_of_2(tokens))]
        whole = [{"bm": height, "warps": warps} for height in heights if height < 64 for warps in (4, 8, 16)]
        streamed = [
            {"bm": height, "warps": warps, "bk": bk, "stages": stages}
            for height in heights
            for warps in (4, 8)
            for bk, stages in ((64, 4), (64, 6), (128, 3), (128, 4))
            if k % bk == 0
        ]
        return [tile | {"bn": GROUP} for tile in whole + streamed]
    bm = _token_tile(tokens, k)
    return [
        {"bm": bm, "bn": bn, "warps": warps}
        for bn in (16, 32, 64, 128)
        for warps in (2, 4, 8)
        if 4096 <= bn * next_power_of_2(k) <= 32768
    ]

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.pages import PAGE
from kernels.latent_cache import Fp8Latent
from kernels.mla_prefill.attention import attend as attend_anywhere
from kernels.mla_prefill.plan import MOST_CHUNKS, PrefillPlan, PrefillScratch
from kernels.quant.naive import GROUP
from kernels.sizes import cdiv, next_power_of_2
from kernels.target import INTERPRETED, current, measured_tile

EVERY = 16384  # tokens of context, from which on not every number of pages is loaded for ahead
SWEPT = 65536  # tokens times heads whose keys and values (512 bytes in the published models) the L2 holds: 32 MB


# What varies from step to step must not make it compile anew.
@triton.jit(do_not_specialize=["tokens", "chunks", "table_row"])
def _gather(
    latent, scale, turned, block_table, cu_contexts, latent_out, rope_out, tokens, chunks,
    latent_page, scale_page, turned_page, latent_row, scale_row, turned_row, table_row,
    PAGE: tl.constexpr, KV_LORA: tl.constexpr, ROPE: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of all contexts one after another, dequantised; zeros past the last."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHUNKS)
    ends = tl.load(cu_contexts + 1 + c, mask=c < chunks, other=0x7FFFFFFF)
    chunk = tl.sum((ends[None, :] <= t[:, None]).to(tl.int32), 1)
    real = (chunk < chunks) & (t < tokens)
    chunk = tl.minimum(chunk, chunks - 1)
    at = t - tl.load(cu_contexts + chunk)
    page = tl.load(block_table + chunk * table_row + at // PAGE, mask=real, other=0).to(tl.int64)[:, None]
    line = (at % PAGE)[:, None]
    column = tl.arange(0, KV_LORA)[None, :]
    values = tl.load(latent + page * latent_page + line * latent_row + column, mask=real[:, None]).to(tl.float32)
    if SCALED:
        scales = scale + page * scale_page + line * scale_row + column // GROUP
        values *= tl.load(scales, mask=real[:, None], other=0.0)
    values = tl.where(real[:, None], values, 0.0)
    t = t.to(tl.int64)[:, None]
    tl.store(latent_out + t * KV_LORA + column, values, mask=t < tokens)
    column = tl.arange(0, ROPE)[None, :]
    values = tl.load(turned + page * turned_page + line * turned_row + column, mask=real[:, None]).to(tl.float32)
    tl.store(rope_out + t * ROPE + column, tl.where(real[:, None], values, 0.0), mask=t < tokens)


def gather(
    cache: Tensor | Fp8Latent, kv_lora: int, plan: PrefillPlan, scratch: PrefillScratch, tokens: int = 0
) -> None:
    """The first plan.tokens rows of scratch.latent and scratch.rope; zeros up to `tokens`, where those are more."""
    tokens = max(tokens, plan.tokens)
    if isinstance(cache, Fp8Latent):
        latent, scale, turned = cache.data, cache.scale, cache.rope
    else:
        latent, turned = cache[..., :kv_lora], cache[..., kv_lora:]
        scale = latent  # not read
    chunks, rows = len(plan.contexts), 8
    _gather[(cdiv(tokens, rows),)](
        latent, scale, turned, plan.block_table, plan.cu_contexts, scratch.latent, scratch.rope, tokens, chunks,
        latent.stride(0), scale.stride(0), turned.stride(0), latent.stride(1), scale.stride(1), turned.stride(1),
        plan.block_table.stride(0), PAGE, kv_lora, turned.shape[2], isinstance(cache, Fp8Latent), GROUP,
        max(MOST_CHUNKS, next_power_of_2(chunks)), rows, num_warps=4,
    )  # fmt: skip


def joint(w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """[kv_lora, heads * (nope + v_dim)]: the one tensor whose parts w_uk [heads, nope, kv_lora] and w_uv [heads,
    kv_lora, v_dim] are. Raises ValueError where they are not."""
    heads, nope, kv_lora = w_uk.shape
    width = nope + w_uv.shape[2]
    follows = w_uk.data_ptr() + nope * kv_lora * w_uk.itemsize == w_uv.data_ptr()
    if w_uk.stride() != (width * kv_lora, kv_lora, 1) or w_uv.stride() != (width * kv_lora, 1, kv_lora) or not follows:
        raise ValueError("w_uk and w_uv must be views of one tensor [heads, nope + v_dim, kv_lora]")
    return w_uk.as_strided((kv_lora, heads * width), (1, kv_lora))


def tile_rule(dtype: torch.dtype, nope: int, rope: int, v_dim: int, heads: int, tokens: int) -> dict:
    """`hopper` chooses the kernel; its BM is fixed. `sweep` is heads taken at a time, see attention.locate."""
    sweep = max(1, min(heads, SWEPT // tokens))
    arch = current().arch
    if dtype.itemsize == 4:
        return {"hopper": 0, "BM": 32, "BN": 32, "warps": 4, "stages": 1, "sweep": sweep}
    if arch == "sm_90" and not INTERPRETED and all(n in (16, 32, 64, 128) for n in (nope, rope, v_dim)):
        return {"hopper": 1, "BN": 128, "stages": 2, "sweep": sweep}
    shape = {"sm_90": (128, 64, 8, 2), "gfx950": (128, 64, 4, 2), "gfx942": (128, 32, 4, 1)}[arch]
    return {"hopper": 0, **dict(zip(("BM", "BN", "warps", "stages"), shape, strict=True)), "sweep": sweep}


def candidates(heads: int, tokens: int) -> list[dict]:
    """For the published models' widths on Hopper."""
    sweeps = sorted({max(1, min(heads, swept // tokens)) for swept in (SWEPT // 2, SWEPT, 2 * SWEPT, heads * tokens)})
    shapes = [{"hopper": 1, "BN": bn, "stages": stages} for bn, stages in ((128, 2), (64, 3), (64, 4))]
    shapes += [
        {"hopper": 0, "BM": bm, "BN": bn, "warps": warps, "stages": stages}
        for bm, bn, warps, stages in ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2))
    ]
    return [shape | {"sweep": sweep} for shape in shapes for sweep in sweeps]


def shape_key(dtype: torch.dtype, nope: int, rope: int, v_dim: int, heads: int) -> str:
    """The name of a shape in tiles.json."""
    return f"{heads} heads of {nope}+{rope}/{v_dim}, {str(dtype).removeprefix('torch.')}"


def attend(
    q: Tensor, kv: Tensor, rope: Tensor, plan: PrefillPlan, scale: float, out: Tensor, tile: dict | None = None
) -> None:
    """q [R, heads, nope + rope] over kv [tokens, heads, nope + v_dim] and rope [tokens, rope]."""
    heads, v_dim = out.shape[1:]
    shape = q.dtype, kv.shape[2] - v_dim, rope.shape[1], v_dim, heads
    if tile is None:
        tile = measured_tile(__file__, shape_key(*shape), plan.tokens) or tile_rule(*shape, plan.tokens)
    scale *= math.log2(math.e)
    if tile["hopper"]:
        from kernels.mla_prefill.hopper import attend as attend_on_hopper

        attend_on_hopper(q, kv, rope, plan, scale, out, tile)
    else:
        attend_anywhere(q, kv, rope, plan, scale, out, tile)


def mla_prefill(
    q: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    cache: Tensor | Fp8Latent,
    plan: PrefillPlan,
    scale: float,
    out: Tensor,
    scratch: PrefillScratch,
    tile: dict | None = None,
) -> None:
    """Gather the latents, expand them for as many heads as the scratch holds, attend with those; then the next heads.

    The expansion is a plain product of [tokens, 512] and [512, heads * 256], 60 % of whose time the tensor cores are
    the bound; cuBLAS is nearer to that than Triton. Gathering first costs it 0.2 % of its bytes.
    """
    if not len(q):
        return
    tokens, width = plan.tokens, w_uk.shape[1] + w_uv.shape[2]
    whole = min(cdiv(tokens, PAGE) * PAGE, len(scratch.latent))
    gather(cache, w_uk.shape[2], plan, scratch, whole)
    for first, end, kv in expansions(w_uk, w_uv, scratch, whole):
        kv, rope = kv[:tokens].view(tokens, -1, width), scratch.rope[:tokens]
        attend(q[:, first:end], kv, rope, plan, scale, out[:, first:end], tile)


def expansions(w_uk: Tensor, w_uv: Tensor, scratch: PrefillScratch, tokens: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first, end, keys and values [tokens, width of those heads]) of some heads after others, in the same memory."""
    weights, width = joint(w_uk, w_uv), w_uk.shape[1] + w_uv.shape[2]
    for first, end in scratch.head_groups(tokens, len(w_uk), width):
        kv = scratch.expanded[: tokens * (end - first) * width].view(tokens, -1)
        yield first, end, torch.mm(scratch.latent[:tokens], weights[:, first * width : end * width], out=kv)


def load_expansions(w_uk: Tensor, w_uv: Tensor, scratch: PrefillScratch) -> None:
    """Of all contexts that fit: the library chooses its kernel by their length, and to load one it waits until the
    device has nothing to do."""
    most = len(scratch.latent)
    for tokens in (*range(PAGE, min(most, EVERY) + 1, PAGE), *range(EVERY, most + 1, EVERY // 4)):
        for _ in expansions(w_uk, w_uv, scratch, tokens):
            pass

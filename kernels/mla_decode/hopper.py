# mypy: ignore-errors
"""The attention of attend.py on sm_90, in Gluon: hopper_pages feeds, hopper_rows multiplies."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda

from common.pages import PAGE
from kernels.hopper import descriptor
from kernels.mla_decode.hopper_pages import BARRIERS, CHUNKS, PAGE_TOKENS, Q_EMPTY, STAGES, feed, widen
from kernels.mla_decode.hopper_rows import follow, lead, side


@gluon.jit
def attention(
    q, q_key, latents, keys, scales, table, context, begin, out, pieces, lse,
    scale, rows, heads, max_pages, latent_pitch, key_pitch, scale_pitch,
    KV_LORA: gl.constexpr, ROPE: gl.constexpr, ROWS: gl.constexpr, FP8: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    MANY: gl.constexpr = ROWS == 64
    CHUNK: gl.constexpr = max(64, KV_LORA // CHUNKS)
    COUNT: gl.constexpr = KV_LORA // CHUNK
    PAGES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE_TOKENS, CHUNK], q.dtype)
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE_TOKENS, ROPE], q.dtype)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, PAGE_TOKENS], q.dtype)
    qs = gl.allocate_shared_memory(q.dtype, [ROWS, KV_LORA], q.layout)
    q_keys = gl.allocate_shared_memory(q.dtype, [ROWS, ROPE], q_key.layout)
    pages = gl.allocate_shared_memory(q.dtype, [STAGES * COUNT, PAGE_TOKENS, CHUNK], PAGES)
    page_keys = gl.allocate_shared_memory(q.dtype, [STAGES, PAGE_TOKENS, ROPE], KEYS)
    bars = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(BARRIERS):
        mbarrier.init(bars.index(k), count=2 if k == Q_EMPTY and not MANY else 1)
    fence_async_shared()
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    feeding = (q, q_key, latents, keys, scales, qs, q_keys, pages, page_keys, bars, table, context, begin,
               rows, max_pages, latent_pitch, key_pitch, scale_pitch, MANY)  # fmt: skip
    if MANY:
        weights = gl.allocate_shared_memory(q.dtype, [ROWS, PAGE_TOKENS], WEIGHTS)
        factors = gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        gl.warp_specialize(
            [
                (lead, (qs, q_keys, pages, page_keys, weights, factors, bars, context, begin, out, pieces, lse,
                        scale, rows, heads, KV_LORA)),
                (follow, (pages, weights, factors, bars, context, begin, out, pieces, rows, KV_LORA)),
                (widen if FP8 else feed, feeding),
            ],
            [4, 4 if FP8 else 1],
            [160, 144] if FP8 else [200, 40],
        )  # fmt: skip
    else:
        weights = gl.allocate_shared_memory(q.dtype, [2, ROWS, PAGE_TOKENS], WEIGHTS)
        halves = gl.allocate_shared_memory(gl.float32, [4, PAGE_TOKENS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        gl.warp_specialize(
            [
                (side, (qs, q_keys, pages, page_keys, weights, halves, bars, context, begin, out, pieces, lse,
                        scale, rows, heads, KV_LORA, 0)),
                (side, (qs, q_keys, pages, page_keys, weights, halves, bars, context, begin, out, pieces, lse,
                        scale, rows, heads, KV_LORA, 1)),
                (widen if FP8 else feed, feeding),
            ],
            [4, 4 if FP8 else 1],
            [160, 160] if FP8 else [208, 40],
        )  # fmt: skip


def page_descriptor(plane: Tensor, columns: int) -> tuple[TensorDescriptor, int]:
    """Of [pages, PAGE, width], as rows, so many columns at a time; and how many of its rows a page is."""
    pitch = plane.stride(0) // plane.stride(1)
    shape = (len(plane) - 1) * pitch + PAGE, plane.shape[2]
    return descriptor(plane.as_strided(shape, plane.stride()[1:]), PAGE, columns), pitch


def attend(
    q: Tensor, latents: Tensor, keys: Tensor, scales: Tensor | None, scale_pitch: int, shared: tuple, max_pages: int,
    sizes: tuple[int, int, int], grid: tuple[int, int],
) -> None:  # fmt: skip
    """`shared`: the block table, the context and the further arguments that `attention` has in common with the portable
    kernel; `sizes`: kv_lora, rope, rows a program."""
    kv_lora, rope, rows = sizes
    flat = q.view(-1, kv_lora + rope)
    queries = descriptor(flat, rows, kv_lora), descriptor(flat, rows, rope)
    if scales is None:
        pages, latent_pitch = page_descriptor(latents, max(64, kv_lora // CHUNKS.value))
        page_keys, key_pitch = page_descriptor(keys, rope)
    else:
        pages, latent_pitch = latents.view(torch.int32), latents.stride(0) // 4
        page_keys, key_pitch = keys, keys.stride(0)
    attention[grid](
        *queries, pages, page_keys, scales, *shared, max_pages, latent_pitch, key_pitch, scale_pitch,
        kv_lora, rope, rows, scales is not None, True, num_warps=4, launch_pdl=True,
    )  # fmt: skip

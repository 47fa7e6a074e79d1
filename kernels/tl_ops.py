"""What several Triton kernels need. Every function is @triton.jit, called from kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from kernels.target import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
FP8_MAX = tl.constexpr(448.0)  # e4m3fn
FP8_MAX_FNUZ = tl.constexpr(240.0)  # e4m3fnuz (gfx942)


@triton.jit
def wait_ahead(PDL: tl.constexpr):
    """What the launches ahead wrote is visible from here on. Every program of an overlapping launch calls it, so that
    when a launch has ended all ahead of it have."""
    if PDL:
        cuda.gdc_wait()


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """The next launch's programs may take their places, and wait in `wait_ahead` for this one's end. Where this is
    called before `wait_ahead`, they may do so even while launches before this one run: what those write they may read
    only after theirs."""
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers, bytes):
    """Ask the L2 for so many bytes from each pointer on; 16 divides both. NVIDIA's alone."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
        [pointers, tl.full(pointers.shape, 0, tl.int32) + bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def to_l1(words, count, COUNT: tl.constexpr):
    """Ask the processor's own cache for `count` words of four bytes; COUNT is the power of two that holds them. For a
    table that no launch of a step changes, before `wait_ahead`. NVIDIA's alone."""
    pointers = words + tl.minimum(tl.arange(0, (COUNT + 31) // 32) * 32, count - 1)  # one a line of 128 bytes
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, float32. The interpreter's bf16 products are garbage: there the operands are widened first."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def fp8_max(dtype: tl.constexpr):
    if dtype == tl.float8e4b8:
        return FP8_MAX_FNUZ
    else:
        return FP8_MAX


@triton.jit
def to_fp8(x, dtype: tl.constexpr):
    """float32 to the nearest e4m3, saturating: not every target's cast does that, and the interpreter's truncates."""
    limit = fp8_max(dtype)
    x = tl.clamp(x, -limit, limit)
    if _INTERPRETED:
        x = _nearest_fp8(x)
    return x.to(dtype)


@triton.jit
def _nearest_fp8(x):
    """The float32 that is the e4m3fn nearest to x, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF  # three bits of mantissa
    tiny = (x + 24576.0) - 24576.0  # multiples of 2^-9, below the smallest normal number
    return tl.where(tl.abs(x) < 0.015625, tiny, bits.to(tl.float32, bitcast=True))

"""MLA decode at the points of anchors.md: attention and joining, on absorbed queries, the schedule given (the peers are
timed so too). And the two products around it, for R1."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels import KernelCase, Launch
from common.pages import PAGE
from kernels.latent_cache import Fp8Latent, page_bytes
from kernels.mla_decode import naive, triton
from kernels.mla_decode.plan import DecodePlan
from kernels.quant.naive import Fp8Rows, quantise_rows

LATENT, ROPE, NOPE, V_DIM = 512, 64, 128, 128
SCALE = (NOPE + ROPE) ** -0.5
ROOM = "mla_decode"
PEERS = {  # us, FlashMLA and FA3 as in anchors.md: (batch, context) -> 128 heads, 16 heads
    (4, 1024): ("half of 18.4", "half of 13.3"), (16, 1024): ("0.75 of 27.4", "half of 16.8"),
    (64, 1024): ("43.5", "34.0"), (128, 1024): ("85.0", "48.9"), (4, 8192): ("35.4", "21.6"),
    (16, 8192): ("82.2", "51.4"), (64, 8192): ("285", "165"), (128, 8192): ("584", ""),
}  # fmt: skip

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # queries [n, 1, heads, width], cache, block table, context


def inputs(n: int, context: int, heads: int) -> Inputs:
    most = -(-context // PAGE)
    cache = torch.randn(n * most, PAGE, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(n * most, device="cuda").view(n, most).int()
    q = 0.3 * torch.randn(n, 1, heads, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    return q, cache, table, torch.full((n,), context, dtype=torch.int32, device="cuda")


def as_fp8(cache: Tensor) -> Fp8Latent:
    held = torch.empty(len(cache), page_bytes(LATENT, ROPE), dtype=torch.uint8, device="cuda")
    coded = Fp8Latent.of(held, LATENT, ROPE)
    for pages in range(0, len(cache), 1024):  # by parts: the reference is not thrifty
        part = slice(pages, pages + 1024)
        quantise_rows(cache[part, :, :LATENT], Fp8Rows(coded.data[part], coded.scale[part]))
    coded.rope.copy_(cache[..., LATENT:])
    return coded


def sets(size: float) -> int:
    """Together larger than the L2, so that the cache is read from the memory, as it is between two layers."""
    return max(2, math.ceil(150e6 / size))


def attention(n: int, context: int, heads: int, fp8: bool) -> KernelCase:
    token = LATENT + LATENT // 128 * 4 + 2 * ROPE if fp8 else 2 * (LATENT + ROPE)
    size = n * context * token
    moved = size + n * heads * 2 * (2 * LATENT + ROPE)

    def every(launch: Callable[[Inputs], Launch]) -> list[Launch]:
        return [launch(inputs(n, context, heads)) for _ in range(sets(size))]

    def new_plan(tile: dict | None) -> DecodePlan:
        kind = dict(fp8=fp8, max_context=context, tile=tile)
        return triton.decode_plan(n, 1, heads, LATENT, ROPE, torch.bfloat16, "cuda", **kind)  # type: ignore[arg-type]

    def make(tile: dict | None) -> list[Launch]:
        plan = new_plan(tile)

        def ours(given: Inputs) -> Launch:
            q, cache, table, lengths = given
            held, out = as_fp8(cache) if fp8 else cache, torch.empty_like(q[..., :LATENT])
            triton.plan_decode(lengths, plan)
            return lambda: triton.attend(q, held, table, lengths, plan, SCALE, out)

        return every(ours)

    def check() -> float:
        q, cache, table, lengths = inputs(n, context, heads)
        plan = new_plan(None)
        out = torch.full_like(q[..., :LATENT], torch.nan)
        triton.plan_decode(lengths, plan)
        triton.attend(q, as_fp8(cache) if fp8 else cache, table, lengths, plan, SCALE, out)
        some = slice(0, 8)
        want = torch.empty_like(out[some], dtype=torch.float32)
        naive.attend(q[some], cache, table[some], lengths[some], SCALE, want)
        return float((out[some] - want).square().mean().sqrt() / want.square().mean().sqrt())

    tuned = (ROOM, triton.shape_key(heads, LATENT, ROPE, fp8, context), n)
    return KernelCase(
        "mla_decode", f"{n} x {context}, {heads} heads, {'fp8' if fp8 else 'bf16'}", make, bytes=moved,
        flops=2 * n * heads * context * (2 * LATENT + ROPE), kind="bf16", tiles=lambda: triton.candidates(heads),
        tuned=tuned, check=check, goal="" if fp8 else PEERS[n, context][heads == 16],
        peers={} if fp8 else {"FlashMLA": lambda: every(flash_mla()), "FA3": lambda: every(fa3(heads))},
    )  # fmt: skip


def flash_mla() -> Callable[[Inputs], Launch]:
    from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata

    schedule = get_mla_metadata()[0]  # filled by the first call, and then kept: all sets have the same contexts

    def one(given: Inputs) -> Launch:
        q, cache, table, lengths = given
        return lambda: flash_mla_with_kvcache(
            q, cache.unsqueeze(2), table, lengths, LATENT, schedule, softmax_scale=SCALE, causal=True
        )

    return one


def fa3(heads: int) -> Callable[[Inputs], Launch]:
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata

    def one(given: Inputs) -> Launch:
        q, cache, table, lengths = given
        n, longest = len(q), table.shape[1] * PAGE
        starts = torch.arange(n + 1, dtype=torch.int32, device="cuda")
        schedule = get_scheduler_metadata(
            batch_size=n, max_seqlen_q=1, max_seqlen_k=longest, num_heads_q=heads, num_heads_kv=1, headdim=ROPE,
            cache_seqlens=lengths, qkv_dtype=q.dtype, headdim_v=LATENT, page_size=PAGE, cu_seqlens_q=starts,
            causal=True,
        )  # fmt: skip
        return lambda: flash_attn_varlen_func(
            q=q[:, 0, :, LATENT:], k=cache[..., LATENT:].unsqueeze(2), v=cache[..., :LATENT].unsqueeze(2),
            q_v=q[:, 0, :, :LATENT], max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=longest, seqused_k=lengths,
            block_table=table, softmax_scale=SCALE, causal=True, fa_version=3, scheduler_metadata=schedule,
        )  # fmt: skip

    return one


def projection(name: str, tokens: int, k: int, n: int, tail: int, kept: bool, coded: bool = False) -> KernelCase:
    """`kept`: the weight's n is contiguous, as it is for absorbing; `coded`: to 8 bits, which the peer leaves out."""
    heads, size = 128, 128 * k * n * 2

    def make(tile: dict | None, library: bool = False) -> list[Launch]:
        def one() -> Launch:
            x = torch.randn(tokens, heads, k + tail, device="cuda", dtype=torch.bfloat16)
            w = torch.randn(heads, *((k, n) if kept else (n, k)), device="cuda", dtype=torch.bfloat16)
            w = w if kept else w.mT
            if library:
                return lambda: torch.bmm(x[..., :k].transpose(0, 1), w)
            out: Tensor | Fp8Rows
            if coded:
                out = Fp8Rows.empty(tokens, heads * n, "cuda")
            else:
                out = torch.empty(tokens, heads, n + tail, device="cuda", dtype=torch.bfloat16)
            return lambda: triton.project(x, w, out, tile)

        return [one() for _ in range(sets(size))]

    return KernelCase(
        "mla_decode", f"{name}, {tokens} tokens", make,
        bytes=size + tokens * heads * (2 * k + (1 if coded else 2) * n + 4 * tail),
        tiles=lambda: triton.projection_candidates(tokens, k, coded),
        tuned=(ROOM, triton.projection_key(heads, k, n, coded), tokens),
        peers={"torch.bmm": lambda: make(None, library=True)}, goal="0.92 of reading",
    )  # fmt: skip


def cases() -> list[KernelCase]:
    points = [(n, context, heads) for heads in (128, 16) for context in (1024, 8192) for n in (4, 16, 64, 128)]
    return [
        *(attention(*point, fp8=fp8) for fp8 in (False, True) for point in points),
        *(projection("absorb, R1", tokens, NOPE, LATENT, ROPE, True) for tokens in (1, 16, 64)),
        *(projection("bring back, R1", tokens, LATENT, V_DIM, 0, False) for tokens in (1, 16, 64)),
        *(projection("bring back in fp8, R1", tokens, LATENT, V_DIM, 0, False, True) for tokens in (1, 16, 64)),
    ]

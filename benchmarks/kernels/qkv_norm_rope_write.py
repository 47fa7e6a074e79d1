"""The fused part between the two products, and the turn of the queries after the second."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels import KernelCase, Launch
from common.pages import PAGE
from kernels.latent_cache import Fp8Latent, page_bytes
from kernels.qkv_norm_rope_write.naive import QkvWeights
from kernels.qkv_norm_rope_write.triton import candidates, norm_rope_write, rope_q, shape_name
from kernels.quant.naive import Fp8Rows

SETS, PAGES = 8, 2048
KV_LORA, ROPE, NOPE = 512, 64, 128


def weights(columns: int, q_lora: int) -> QkvWeights:
    def ones(width: int) -> Tensor:
        return torch.ones(width, device="cuda", dtype=torch.bfloat16)

    q_norm = ones(q_lora) if q_lora else None
    return QkvWeights(torch.empty(1, columns), None, ones(KV_LORA), q_norm, None, queries_first=bool(q_lora))


def new_cache(fp8: bool) -> Tensor | Fp8Latent:
    if not fp8:
        return torch.zeros(PAGES, PAGE, KV_LORA + ROPE, device="cuda", dtype=torch.bfloat16)
    flat = torch.zeros(PAGES, page_bytes(KV_LORA, ROPE), device="cuda", dtype=torch.uint8)
    return Fp8Latent.of(flat, KV_LORA, ROPE)


def turned(tokens: int) -> tuple[Tensor, Tensor]:
    table = torch.polar(torch.ones(8192, ROPE // 2), torch.rand(8192, ROPE // 2)).cuda()
    return table, torch.randint(8192, (tokens,), device="cuda")


def norm_case(name: str, tokens: int, q_lora: int, heads: int, fp8: bool) -> KernelCase:
    width = q_lora or heads * (NOPE + ROPE)
    columns = KV_LORA + ROPE + width

    def make(tile: dict | None) -> list[Launch]:
        cache = new_cache(fp8)

        def one() -> Launch:
            a, w = torch.randn(tokens, columns, device="cuda").bfloat16(), weights(columns, q_lora)
            turns, positions = turned(tokens)
            write = torch.randperm(PAGES * PAGE, device="cuda")[:tokens]
            q: Tensor | Fp8Rows = torch.empty(tokens, width, device="cuda", dtype=torch.bfloat16)
            if not q_lora:
                q = q.view(tokens, heads, -1)  # type: ignore[union-attr]
            elif fp8:
                q = Fp8Rows.empty(tokens, q_lora, "cuda")
            return lambda: norm_rope_write(*w.split(a, KV_LORA + ROPE), w, turns, write, cache, q, positions, tile)

        return [one() for _ in range(SETS)]

    latent = KV_LORA * (1 + 4 / 128) + 2 * ROPE if fp8 else 2 * (KV_LORA + ROPE)
    out = width * (1 + 4 / 128) if fp8 and q_lora else 2 * width
    return KernelCase(
        "qkv_norm_rope_write", f"{name}, {tokens} tokens", make, bytes=tokens * (2 * columns + latent + out),
        tiles=lambda: candidates(tokens), tuned=("qkv_norm_rope_write", shape_name(width, bool(q_lora)), tokens),
        goal="<= 4 us at 64 tokens",
    )  # fmt: skip


def rope_case(tokens: int, heads: int) -> KernelCase:
    def make(tile: dict | None) -> list[Launch]:
        def one() -> Launch:
            q = torch.randn(tokens, heads, NOPE + ROPE, device="cuda").bfloat16()
            turns, positions = turned(tokens)
            return lambda: rope_q(q, turns, q[:, :, NOPE:], positions)

        return [one() for _ in range(SETS)]

    return KernelCase("rope_q", f"{heads} heads, {tokens} tokens", make, bytes=tokens * heads * ROPE * 4)


def cases() -> list[KernelCase]:
    sizes = (1, 16, 64, 4096)
    return [
        *(norm_case("R1, fp8", tokens, 1536, 128, True) for tokens in sizes),
        *(norm_case("R1, bf16", tokens, 1536, 128, False) for tokens in sizes),
        *(norm_case("V2-Lite", tokens, 0, 16, False) for tokens in sizes),
        *(rope_case(tokens, 128) for tokens in sizes),
    ]

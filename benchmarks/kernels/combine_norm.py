from __future__ import annotations

import torch

from benchmarks.kernels import KernelCase, Launch
from kernels.combine_norm.naive import SlotRows
from kernels.combine_norm.triton import combine_norm
from kernels.quant.naive import Fp8Rows

SETS = 8  # activations are warm in the engine too: a few sets only keep the graph from being one launch
WRITTEN = {"wide": 2, "in 8 bits": 1, "both": 3}  # bytes of a number, in the residual's type, in 8 bits, or in both


def case(name: str, tokens: int, hidden: int, topk: int, kind: str) -> KernelCase:
    def make(tile: dict | None) -> list[Launch]:
        def one() -> Launch:
            x, part = torch.randn(2, tokens, hidden, device="cuda").bfloat16()
            rows = torch.randn(tokens * topk, hidden, device="cuda").bfloat16()
            slots = torch.randperm(tokens * topk, device="cuda").view(tokens, topk).int()
            weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
            codes = Fp8Rows.empty(tokens, hidden, "cuda")
            out = codes if kind == "in 8 bits" else torch.empty_like(x)
            coded = codes if kind == "both" else None
            parts = (part, SlotRows(rows, slots)) if topk else ()
            return lambda: combine_norm(x, parts, weight, 1e-6, out, coded)

        return [one() for _ in range(SETS)]

    moved = tokens * hidden * (2 * (3 + topk if topk else 2) + WRITTEN[kind])
    return KernelCase("combine_norm", f"{name}, {tokens} tokens", make, bytes=moved)


def cases() -> list[KernelCase]:
    shapes = [
        ("R1, fp8 out", 7168, 8, "in 8 bits"),
        ("R1, before experts", 7168, 0, "both"),
        ("V2-Lite", 2048, 6, "wide"),
    ]
    return [case(name, tokens, *shape) for name, *shape in shapes for tokens in (1, 16, 64, 4096)]

from __future__ import annotations

import torch

from common.pages import PAGE
from kernels.latent_cache import Fp8Latent, page_bytes
from kernels.mla_decode import triton
from kernels.quant.naive import Fp8Rows
from kernels.target import current
from tests.kernel_cases import Case

LATENT, ROPE = 512, 64


def launch(
    heads: int, q_tokens: int = 1, fp8: bool = False, portable: bool = False, latent: int = LATENT,
    max_context: int = 1 << 20,
) -> None:  # fmt: skip
    tile = triton.tile_rule(4, heads * q_tokens, latent, ROPE, fp8, max_context)
    tile = tile | {"hopper": int(current().arch == "sm_90" and not portable)}
    plan = triton.decode_plan(4, q_tokens, heads, latent, ROPE, torch.bfloat16, "cpu", fp8=fp8, tile=tile)
    if fp8:
        held = torch.empty(8, page_bytes(latent, ROPE), dtype=torch.uint8)
        cache: torch.Tensor | Fp8Latent = Fp8Latent.of(held, latent, ROPE, current().fp8)
    else:
        cache = torch.empty(8, PAGE, latent + ROPE, dtype=torch.bfloat16)
    context, table = torch.empty(4, dtype=torch.int32), torch.empty(4, 32, dtype=torch.int32)
    triton.plan_decode(context, plan)
    triton.attend(plan.absorbed, cache, table, context, plan, 0.1, plan.latent)


def project(heads: int, tokens: int) -> None:
    x = torch.empty(tokens, heads, 128 + ROPE, dtype=torch.bfloat16)
    absorbed = torch.empty(tokens, heads, LATENT + ROPE, dtype=torch.bfloat16)
    triton.project(x, torch.empty(heads, 128, LATENT, dtype=torch.bfloat16), absorbed)
    out = torch.empty(tokens, heads, 128, dtype=torch.bfloat16)
    w_uv = torch.empty(heads, 128, LATENT, dtype=torch.bfloat16).mT
    latent = torch.empty(tokens, heads, LATENT, dtype=torch.bfloat16)
    triton.project(latent, w_uv, out)
    if heads == 128 and triton.codes_heads(LATENT, 128):
        coded = Fp8Rows.empty(tokens, heads * 128, "cpu", current().fp8)
        triton.project(latent, w_uv, coded)
        if current().arch == "sm_90":  # the others have no measured tiles
            pieces = {"bm": min(64, max(32, tokens)), "bn": 128, "warps": 8, "bk": 128, "stages": 4}
            triton.project(latent, w_uv, coded, pieces)


CASES = [
    Case("R1", lambda: launch(128), hot=True),
    Case("R1, short contexts", lambda: launch(128, max_context=1024), hot=True),
    Case("V2-Lite", lambda: launch(16), hot=True),
    Case("V2-Lite, 2 query tokens", lambda: launch(16, 2), hot=True),
    Case("small", lambda: launch(4, latent=128)),
    Case("R1, fp8 cache", lambda: launch(128, fp8=True)),
    Case("V2-Lite, fp8 cache", lambda: launch(16, fp8=True)),
    Case("R1, portable", lambda: launch(128, portable=True)),
    Case("V2-Lite, portable", lambda: launch(16, portable=True)),
    Case("R1, portable, fp8 cache", lambda: launch(128, fp8=True, portable=True)),
    Case("absorb and bring back, R1", lambda: project(128, 1), hot=True),
    Case("absorb and bring back, R1, 64 tokens", lambda: project(128, 64), hot=True),
    Case("absorb and bring back, V2-Lite, 64 tokens", lambda: project(16, 64), hot=True),
]

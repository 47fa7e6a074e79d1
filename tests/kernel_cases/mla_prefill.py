from __future__ import annotations

import torch

from common.pages import PAGE
from kernels.latent_cache import Fp8Latent, page_bytes
from kernels.mla_prefill.plan import PrefillPlan, PrefillScratch
from kernels.mla_prefill.triton import attend, gather
from kernels.target import current
from tests.kernel_cases import Case


def launch(heads: int, nope: int = 128, v_dim: int = 128, fp8: bool = False) -> None:
    """The two kernels; the product between them is the library's."""
    kv_lora, rope, dtype, rows = 512, 64, torch.bfloat16, 66
    plan = PrefillPlan.of([64, 2], [64, 70], [torch.arange(1), torch.arange(2)])
    scratch = PrefillScratch.empty(plan.tokens, heads, nope + v_dim, kv_lora, rope, dtype, "cpu")
    cache: torch.Tensor | Fp8Latent = torch.empty(2, PAGE, kv_lora + rope, dtype=dtype)
    if fp8:
        pages = torch.empty(2, page_bytes(kv_lora, rope), dtype=torch.uint8)
        cache = Fp8Latent.of(pages, kv_lora, rope, current().fp8)
    gather(cache, kv_lora, plan, scratch)
    q, out = torch.empty(rows, heads, nope + rope, dtype=dtype), torch.empty(rows, heads, v_dim, dtype=dtype)
    attend(q, scratch.expanded.view(plan.tokens, heads, -1), scratch.rope, plan, 0.1, out)


CASES = [
    Case("R1", lambda: launch(128), hot=True),
    Case("V2-Lite, fp8 cache", lambda: launch(16, fp8=True), hot=True),
    Case("odd widths", lambda: launch(6, nope=48, v_dim=80)),
]

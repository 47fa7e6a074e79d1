from __future__ import annotations

import torch
from torch import Tensor

from common.pages import PAGE
from kernels.latent_cache import Fp8Latent, page_bytes
from kernels.qkv_norm_rope_write.naive import QkvWeights
from kernels.qkv_norm_rope_write.triton import norm_rope_write, rope_q
from kernels.quant.naive import Fp8Rows
from kernels.target import current
from tests.kernel_cases import Case

TOKENS = 4


def rows(width: int) -> Tensor:
    return torch.empty(TOKENS, width, dtype=torch.bfloat16)


def launch(q_lora: int, heads: int, fp8: bool, bias: bool = False) -> None:
    kv_lora, rope, nope = 512, 64, 128
    width = q_lora or heads * (nope + rope)
    norm = torch.empty(q_lora, dtype=torch.bfloat16) if q_lora else None
    a = rows(kv_lora + rope + width)
    w = QkvWeights(a, rows(a.shape[1])[0] if bias else None, rows(kv_lora)[0], norm, None, queries_first=fp8)
    turns, positions = torch.empty(4096, rope // 2, dtype=torch.complex64), torch.empty(TOKENS, dtype=torch.int64)
    cache: Tensor | Fp8Latent = torch.empty(2, PAGE, kv_lora + rope, dtype=torch.bfloat16)
    if fp8:
        cache = Fp8Latent.of(torch.empty(2, page_bytes(kv_lora, rope), dtype=torch.uint8), kv_lora, rope, current().fp8)
    q = rows(heads * (nope + rope)).view(TOKENS, heads, -1)
    q_low = Fp8Rows.empty(TOKENS, q_lora, "cpu", current().fp8) if fp8 else rows(q_lora)
    norm_rope_write(*w.split(a, kv_lora + rope), w, turns, positions, cache, q_low if q_lora else q, positions)
    rope_q(q, turns, q[:, :, nope:], positions)


CASES = [
    Case("R1, fp8", lambda: launch(1536, 128, True), hot=True),
    Case("R1, bf16, bias", lambda: launch(1536, 128, False, bias=True), hot=True),
    Case("V2-Lite", lambda: launch(0, 16, False), hot=True),
    Case("no q_lora, bias", lambda: launch(0, 16, False, bias=True)),
]

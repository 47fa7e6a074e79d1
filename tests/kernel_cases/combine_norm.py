from __future__ import annotations

import torch

from kernels.combine_norm.naive import SlotRows
from kernels.combine_norm.triton import combine_norm
from kernels.quant.naive import Fp8Rows
from kernels.target import current
from tests.kernel_cases import Case


def launch(hidden: int, quantised: bool, topk: int) -> None:
    x, weight = torch.empty(4, hidden, dtype=torch.bfloat16), torch.empty(hidden, dtype=torch.bfloat16)
    slots = SlotRows(torch.empty(4 * topk, hidden, dtype=x.dtype), torch.empty(4, topk, dtype=torch.int32))
    codes = Fp8Rows.empty(4, hidden, "cpu", current().fp8)
    combine_norm(x, (torch.empty_like(x), slots), weight, 1e-6, codes if quantised else torch.empty_like(x))
    if quantised:
        combine_norm(x, (), weight, 1e-6, torch.empty_like(x), codes)


CASES = [
    Case("R1, fp8 out", lambda: launch(7168, True, 8), hot=True),
    Case("V2-Lite", lambda: launch(2048, False, 6), hot=True),
]

from __future__ import annotations

import torch

from kernels.quant.naive import Fp8Rows
from kernels.quant.triton import quantise_rows
from kernels.target import current
from tests.kernel_cases import Case


def launch(width: int, dtype: torch.dtype) -> None:
    quantise_rows(torch.empty(4, width, dtype=dtype), Fp8Rows.empty(4, width, "cpu", current().fp8))


CASES = [
    Case("R1, bf16", lambda: launch(7168, torch.bfloat16), hot=True),
    Case("R1, float32", lambda: launch(7168, torch.float32), hot=True),
    Case("one group", lambda: launch(128, torch.bfloat16), hot=True),
]

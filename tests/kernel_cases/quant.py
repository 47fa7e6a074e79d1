from __future__ import annotations

import torch

from kernels.quant.naive import Fp8Blocks, Fp8Rows
from kernels.quant.triton import quantise_blocks, quantise_rows
from kernels.target import current
from tests.kernel_cases import Case


def launch(width: int, dtype: torch.dtype) -> None:
    quantise_rows(torch.empty(4, width, dtype=dtype), Fp8Rows.empty(4, width, "cpu", current().fp8))


def launch_blocks(rows: int, columns: int, dtype: torch.dtype) -> None:
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    quantise_blocks(
        torch.empty(rows, columns, dtype=dtype), Fp8Blocks(torch.empty(rows, columns, dtype=current().fp8), scale)
    )


CASES = [
    Case("R1, bf16", lambda: launch(7168, torch.bfloat16), hot=True),
    Case("R1, float32", lambda: launch(7168, torch.float32), hot=True),
    Case("blocks of a weight", lambda: launch_blocks(2048, 7168, torch.bfloat16), hot=False),
    Case("blocks at an edge, float32", lambda: launch_blocks(130, 300, torch.float32), hot=False),
    Case("one group", lambda: launch(128, torch.bfloat16), hot=True),
]

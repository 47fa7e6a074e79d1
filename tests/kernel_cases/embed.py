from __future__ import annotations

import torch

from kernels.embed.triton import embed
from tests.kernel_cases import Case


def launch(hidden: int) -> None:
    tokens, source = torch.empty(64, dtype=torch.int64), torch.empty(64, dtype=torch.int32)
    table, out = torch.empty(512, hidden, dtype=torch.bfloat16), torch.empty(64, hidden, dtype=torch.bfloat16)
    embed(tokens, source, torch.empty(64, dtype=torch.int64), table, out, torch.empty(64, dtype=torch.int32))


CASES = [Case("R1", lambda: launch(7168), hot=True), Case("V2-Lite", lambda: launch(2048), hot=True)]

from __future__ import annotations

import torch

from kernels.expert_plan.naive import ExpertPlan
from kernels.expert_plan.triton import plan_experts
from tests.kernel_cases import Case


def launch(tokens: int, topk: int, held: int, block_rows: int) -> None:
    ids, slots = torch.empty(tokens, topk, dtype=torch.int32), torch.empty(held + 1, dtype=torch.int64)
    plan_experts(ids, slots, held, ExpertPlan.empty(tokens, topk, held, block_rows, "cpu"))


CASES = [
    Case("R1, 1 token", lambda: launch(1, 9, 257, 16), hot=True),
    Case("R1, 64 tokens", lambda: launch(64, 9, 257, 16), hot=True),
    Case("R1, 128 tokens", lambda: launch(128, 9, 257, 16), hot=True),
    Case("V2-Lite, 64 tokens", lambda: launch(64, 6, 64, 16), hot=True),
    Case("R1, 4096 tokens", lambda: launch(4096, 9, 257, 64)),
]

from __future__ import annotations

import torch

from kernels.expert_plan.naive import ExpertPlan
from kernels.route.naive import RouteScratch, Routing
from kernels.route.triton import route
from tests.kernel_cases import Case

R1 = 7168, 256, Routing(8, "sigmoid", "noaux_tc", 8, 4, True, 2.5, shared=1)
V2_LITE = 2048, 64, Routing(6, "softmax", "greedy", 1, 1, False, 1.0)


def launch(shape: tuple[int, int, Routing], tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    hidden, experts, rule = shape
    held, columns = experts + rule.shared, rule.topk + rule.shared
    x, w_gate = torch.empty(tokens, hidden, dtype=torch.bfloat16), torch.empty(experts, hidden, dtype=dtype).T
    bias = torch.empty(experts) if rule.method == "noaux_tc" else None
    ids, weights = torch.empty(tokens, columns, dtype=torch.int32), torch.empty(tokens, columns)
    plan = ExpertPlan.empty(tokens, columns, held, 16, "cpu")
    slots, scratch = torch.empty(held + 1, dtype=torch.int64), RouteScratch.empty(tokens, held, "cpu")
    route(x, w_gate, bias, rule, ids, weights, plan, slots, held, scratch)


CASES = [
    *(Case(f"R1, {t} tokens", lambda t=t: launch(R1, t), hot=True) for t in (1, 16, 64, 128)),
    *(Case(f"V2-Lite, {t} tokens", lambda t=t: launch(V2_LITE, t), hot=True) for t in (1, 64)),
    Case("R1, 4096 tokens", lambda: launch(R1, 4096)),
    Case("R1, 64 tokens, float32 weights", lambda: launch(R1, 64, torch.float32)),
]

"""From the experts each token chose to the order and blocks of the grouped products."""

from torch import Tensor

from kernels.expert_plan import naive
from kernels.expert_plan.naive import ExpertPlan

__all__ = ["ExpertPlan", "plan_experts"]


def plan_experts(
    ids: Tensor,  # int32 or int64 [T, topk], -1: not for you
    slots: Tensor,  # [experts + 1], of experts.slot_table: id -> slot, or `held` where it is not held
    held: int,
    plan: ExpertPlan,  # out
) -> None:
    """Sort the pairs by the slot of their expert, and cut each expert's into blocks."""
    if ids.is_cuda:
        from kernels.expert_plan import triton

        triton.plan_experts(ids, slots, held, plan)
    else:
        naive.plan_experts(ids, slots, held, plan)

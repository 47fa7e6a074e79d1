"""From the experts each token chose to the order and blocks of the grouped products."""

from kernels.expert_plan.naive import ExpertPlan, plan_experts

__all__ = ["ExpertPlan", "plan_experts"]

"""Routed expert FFNs of one layer, weighted; summed, or left for combine_norm to sum."""

from torch import Tensor

from kernels.combine_norm.naive import SlotRows
from kernels.expert_plan import plan_experts
from kernels.experts import naive
from kernels.experts.naive import slot_table
from kernels.experts.work import ExpertWork
from kernels.quant.naive import Fp8Blocks, Fp8Rows

__all__ = ["ExpertWork", "experts", "grouped_ffn", "slot_table"]


def experts(
    x: Tensor | Fp8Rows,  # [T, hidden]
    ids: Tensor,  # int32 or int64 [T, topk], -1: not for you; a token's differ
    weights: Tensor,  # [T, topk], float32; on a CPU of x's dtype
    gate_up: Tensor | Fp8Blocks,  # [held, hidden, 2 * inter], input-major, gate first
    down: Tensor | Fp8Blocks,  # [held, inter, hidden], input-major
    slots: Tensor,  # [experts + 1], of slot_table
    out: Tensor,  # [T, hidden]
    work: ExpertWork | None = None,  # needed on a GPU, and in fp8
) -> None:
    """out[t] = sum over k of weights[t, k] * (silu(x[t] @ gate) * (x[t] @ up)) @ down of expert ids[t, k], if held."""
    if not ids.is_cuda:
        naive.experts(x, ids, weights, gate_up, down, slots, out, work)
        return
    if work is None:
        raise ValueError("experts on a GPU need their work")
    from kernels.experts import triton

    held = len(gate_up.data)
    plan_experts(ids, slots, held, work.plan)
    triton.sum_slots(triton.grouped_ffn(x, weights, gate_up, down, work), out)


def grouped_ffn(
    x: Tensor | Fp8Rows,  # [T, hidden]
    weights: Tensor,  # float32 [T, topk]
    gate_up: Tensor | Fp8Blocks,  # [held, hidden, 2 * inter]
    down: Tensor | Fp8Blocks,  # [held, inter, hidden]
    work: ExpertWork,  # its plan is made
) -> SlotRows:
    """The weighted row of each placed pair."""
    if weights.is_cuda:
        from kernels.experts import triton

        return triton.grouped_ffn(x, weights, gate_up, down, work)
    return naive.grouped_ffn(x, weights, gate_up, down, work)

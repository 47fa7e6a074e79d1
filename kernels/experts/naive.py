from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.combine_norm.naive import SlotRows
from kernels.expert_plan.naive import plan_experts
from kernels.experts.work import ExpertWork
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows, dequantise, quantise_rows

DENSE_ROWS = 16


def slot_table(slots: Mapping[int, int], experts: int) -> Tensor:
    """int64 [experts + 1]: expert id -> its place in the stacked weights, and len(slots) for those not held.

    The last entry stands for id -1 ("not for you"), which indexes from the end.
    """
    table = torch.full((experts + 1,), len(slots), dtype=torch.int64)
    for expert, slot in slots.items():
        table[expert] = slot
    return table


def experts(
    x: Tensor | Fp8Rows,  # [T, hidden]
    ids: Tensor,  # int32 or int64 [T, topk], -1: not for you
    weights: Tensor,  # [T, topk]
    gate_up: Tensor | Fp8Blocks,  # [held, hidden, 2 * inter], input-major, gate first
    down: Tensor | Fp8Blocks,  # [held, inter, hidden], input-major
    slots: Tensor,  # [experts + 1], of slot_table
    out: Tensor,  # [T, hidden]
    work: ExpertWork | None = None,  # needed in fp8 alone
) -> None:
    """out[t] = sum over k of weights[t, k] * (silu(x[t] @ gate) * (x[t] @ up)) @ down of expert ids[t, k], if held.

    The sum runs in the order of the stacks, so it does not depend on the order of `ids`. Weights lie input-major
    because with few rows that product is twice as fast on a CPU.
    """
    if isinstance(gate_up, Fp8Blocks):
        if work is None:
            raise ValueError("experts in fp8 need their work")
        plan_experts(ids, slots, len(gate_up.data), work.plan)
        out.copy_(grouped_ffn(x, weights, gate_up, down, work).sum())
        return
    assert isinstance(x, Tensor) and isinstance(down, Tensor)
    rows, topk = ids.shape
    places = slots[ids]  # [T, topk]
    # Few rows that touch most experts: all experts for all rows are two large products, cheaper than many small ones.
    if rows <= DENSE_ROWS and rows * topk >= len(down):
        _dense(x, places, weights, gate_up, down, out)
    else:
        _grouped(x, places, weights, gate_up, down, out)


def _dense(x: Tensor, places: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, out: Tensor) -> None:
    rows, (held, inter, hidden) = len(x), down.shape
    gates = x.new_zeros(rows, held + 1).scatter_(1, places, weights)[:, :held, None]  # [T, held, 1]
    gate, up = torch.bmm(x.expand(held, rows, hidden), gate_up).split(inter, dim=2)  # [held, T, inter] each
    act = x.new_empty(rows, held, inter)
    torch.mul(F.silu(gate), up, out=act.transpose(0, 1))
    torch.mm(act.mul_(gates).view(rows, held * inter), down.view(held * inter, hidden), out=out)


def _grouped(x: Tensor, places: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, out: Tensor) -> None:
    held, inter, _ = down.shape
    out.zero_()
    flat = places.flatten()
    order = flat.argsort(stable=True)  # (row, k) pairs, those of one expert together
    counts = torch.bincount(flat, minlength=held + 1).tolist()[:held]
    pair_rows = order // places.shape[1]
    pair_weights = weights.flatten()[order].unsqueeze(1)
    start = 0
    for slot, count in enumerate(counts):
        if count:
            pairs = slice(start, start + count)
            mine = pair_rows[pairs]
            gate, up = torch.mm(x[mine], gate_up[slot]).split(inter, dim=1)  # [count, inter]
            act = F.silu(gate).mul_(up).mul_(pair_weights[pairs])
            out.index_add_(0, mine, torch.mm(act, down[slot]))
            start += count


def grouped_ffn(
    x: Tensor | Fp8Rows,  # [T, hidden]
    weights: Tensor,  # [T, topk]
    gate_up: Tensor | Fp8Blocks,  # [held, hidden, 2 * inter]
    down: Tensor | Fp8Blocks,  # [held, inter, hidden]
    work: ExpertWork,  # its plan is made
) -> SlotRows:
    """The weighted rows of every placed pair: row p = weights[pair] * (silu(x @ gate) * (x @ up)) @ down of the expert
    in whose block place p lies. In fp8 what goes into `down` is quantised again."""
    plan, topk, wide = work.plan, weights.shape[1], _wide(x)
    for slot, first, count in plan.blocks[: int(plan.counts[0])].tolist():
        block = slice(first, first + count)
        pairs = plan.pairs[block].long()
        gate, up = (wide[pairs // topk] @ _wide(gate_up, slot)).chunk(2, dim=1)  # [count, inter]
        act = F.silu(gate) * up
        if isinstance(down, Fp8Blocks):
            act = _rounded(act, down.data.dtype)
        work.rows[block] = ((act @ _wide(down, slot)) * weights.flatten()[pairs, None]).to(work.rows.dtype)
    return SlotRows(work.rows, plan.places)


def _wide(x: Tensor | Fp8Rows | Fp8Blocks, slot: int | None = None) -> Tensor:
    """float32, of one expert of a stack."""
    if isinstance(x, Tensor):
        return (x if slot is None else x[slot]).float()
    if isinstance(x, Fp8Blocks) and slot is not None:
        x = Fp8Blocks(x.data[slot], x.scale[slot])
    return dequantise(x)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    coded = Fp8Rows(torch.empty_like(x, dtype=dtype), x.new_empty(len(x), x.shape[1] // GROUP))
    quantise_rows(x, coded)
    return dequantise(coded)

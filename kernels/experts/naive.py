from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

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
    x: Tensor,  # [T, hidden]
    ids: Tensor,  # int32 or int64 [T, topk], -1: not for you
    weights: Tensor,  # [T, topk]
    gate_up: Tensor,  # [held, hidden, 2 * inter], input-major, gate first
    down: Tensor,  # [held, inter, hidden], input-major
    slots: Tensor,  # [experts + 1], of slot_table
    out: Tensor,  # [T, hidden]
) -> None:
    """out[t] = sum over k of weights[t, k] * (silu(x[t] @ gate) * (x[t] @ up)) @ down of expert ids[t, k], if held.

    The sum runs in the order of the stacks, so it does not depend on the order of `ids`. Weights lie input-major
    because with few rows that product is twice as fast on a CPU.
    """
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

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels import KernelCase, Launch
from kernels.expert_plan.naive import ExpertPlan
from kernels.route import naive
from kernels.route.naive import RouteScratch, Routing
from kernels.route.tiles import candidates, shape_name, tile_for
from kernels.route.triton import choose, product, route

R1 = "R1", 7168, 256, Routing(8, "sigmoid", "noaux_tc", 8, 4, True, 2.5)
V2_LITE = "V2-Lite", 2048, 64, Routing(6, "softmax", "greedy", 1, 1, False, 1.0)
COLD = 80e6  # bytes of a round, more than the L2 holds
BF16 = torch.bfloat16


class Inputs:
    """A layer's router and a step's tokens."""

    def __init__(self, tokens: int, hidden: int, experts: int, rule: Routing) -> None:
        self.rule, self.experts, self.block_rows = rule, experts, 16 if tokens <= 256 else 64
        self.x = torch.randn(tokens, hidden, device="cuda").bfloat16()
        self.w_gate = (torch.randn(experts, hidden, device="cuda") * hidden**-0.5).bfloat16().T
        self.bias = torch.rand(experts, device="cuda") if rule.method == "noaux_tc" else None
        self.ids = torch.empty(tokens, rule.topk, dtype=torch.int32, device="cuda")
        self.weights = torch.empty(tokens, rule.topk, device="cuda")
        self.plan = ExpertPlan.empty(tokens, rule.topk, experts, self.block_rows, "cuda")
        self.slots = torch.arange(experts + 1, device="cuda")

    def outputs(self) -> tuple:
        return self.ids, self.weights, self.plan, self.slots, self.experts


def torch_launch(one: Inputs) -> Launch:
    """What one would write: a product in float32, scores, top-k, and a stable sort of the pairs."""

    def launch() -> None:
        logits = torch.mm(one.x, one.w_gate, out_dtype=torch.float32)
        scores = logits.sigmoid() if one.rule.scoring == "sigmoid" else logits.softmax(-1)
        choice = scores if one.bias is None else scores + one.bias
        if one.rule.method != "greedy":
            choice = naive._within_best_groups(choice, one.rule)
        ids = choice.topk(one.rule.topk, sorted=False).indices
        weights = scores.gather(1, ids)
        if one.rule.norm:
            weights = weights / weights.sum(-1, keepdim=True)
        torch.mul(weights, one.rule.scale, out=one.weights)
        one.ids.copy_(ids)
        slot = one.slots[ids.flatten()]
        slot.sort(stable=True)
        torch.zeros(one.experts, dtype=torch.int64, device="cuda").scatter_add_(0, slot, torch.ones_like(slot)).cumsum(
            0
        )

    return launch


def vllm_launch(one: Inputs) -> Launch:
    try:
        from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
        from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk
    except ImportError:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_topk, grouped_topk
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    def launch() -> None:
        logits = torch.mm(one.x, one.w_gate, out_dtype=torch.float32)
        if one.rule.method == "greedy":
            ids = fused_topk(one.x, logits, one.rule.topk, one.rule.norm)[1]
        else:
            ids = grouped_topk(
                one.x, logits, one.rule.topk, one.rule.norm, one.rule.groups, one.rule.topk_groups,
                one.rule.scoring, one.rule.scale, one.bias,
            )[1]  # fmt: skip
        moe_align_block_size(ids, one.block_rows, one.experts)

    return launch


def error(one: Inputs, launch: Launch) -> float:
    """Of the weights, over the tokens whose choices agree; infinite if one in a thousand does not."""

    def spread(ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros(len(ids), one.experts, dtype=torch.float64, device="cuda").scatter_(
            1, ids.long(), weights.double()
        )

    launch()
    ids, weights = torch.empty_like(one.ids), torch.empty_like(one.weights)
    naive.route(one.x.float(), one.w_gate.float(), one.bias, one.rule, ids, weights)
    got, want = spread(one.ids, one.weights), spread(ids, weights)
    agree = ((got > 0) == (want > 0)).all(1)
    if int((~agree).sum()) > len(agree) // 1000:
        return float("inf")
    return float((got - want)[agree].square().mean().sqrt() / want[agree].square().mean().sqrt())


def case(shape: tuple[str, int, int, Routing], tokens: int) -> KernelCase:
    name, hidden, experts, rule = shape
    moved = 2 * hidden * (experts + tokens) + 8 * tokens * rule.topk
    sets = min(256, max(2, int(COLD / moved)))

    def launcher(one: Inputs, tile: dict | None, scratch: RouteScratch) -> Launch:
        return lambda: route(one.x, one.w_gate, one.bias, rule, *one.outputs(), scratch, tile)

    def fresh(start: Callable[[Inputs], Launch]) -> list[Launch]:
        return [start(Inputs(tokens, hidden, experts, rule)) for _ in range(sets)]

    def make(tile: dict | None) -> list[Launch]:
        scratch = RouteScratch.empty(tokens, experts, "cuda")
        return fresh(lambda one: launcher(one, tile, scratch))

    def check() -> float:
        one = Inputs(tokens, hidden, experts, rule)
        return error(one, launcher(one, None, RouteScratch.empty(tokens, experts, "cuda")))

    return KernelCase(
        "route", f"{name}, {tokens} tokens, with the plan", make, bytes=moved, flops=2 * tokens * hidden * experts,
        kind="bf16", tiles=lambda: candidates(tokens, hidden, experts),
        tuned=("route", shape_name(hidden, experts, BF16), tokens), check=check,
        peers={"torch": lambda: fresh(torch_launch), "vLLM": lambda: fresh(vllm_launch)},
        goal="<= 8 us" if name == "R1" and tokens <= 64 else "",
    )  # fmt: skip


def half(shape: tuple[str, int, int, Routing], tokens: int, second: bool) -> KernelCase:
    """One of the two launches alone. The first can overlap with its own predecessor, as in the engine."""
    name, hidden, experts, rule = shape

    def make(_: dict | None) -> list[Launch]:
        scratch = RouteScratch.empty(tokens, experts, "cuda")
        tile = tile_for(tokens, hidden, experts, BF16, BF16)

        def one() -> Launch:
            made = Inputs(tokens, hidden, experts, rule)
            splits = product(made.x, made.w_gate, scratch, tile)
            if second:
                return lambda: choose(splits, experts, made.bias, rule, *made.outputs(), scratch, tile)
            return lambda: product(made.x, made.w_gate, scratch, tile)

        return [one() for _ in range(20)]

    what, moved = ("all after the product", 0) if second else ("the product", 2 * hidden * (experts + tokens))
    goal = "<= 4 us" if second and tokens == 1 else ""
    return KernelCase("route", f"{name}, {tokens} tokens, {what}", make, bytes=moved, kind="bf16", goal=goal)


def cases() -> list[KernelCase]:
    whole = [case(shape, tokens) for shape in (R1, V2_LITE) for tokens in (1, 16, 64, 128, 1024, 4096)]
    return whole + [half(R1, tokens, second) for tokens in (1, 64) for second in (False, True)]

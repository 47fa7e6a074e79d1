from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.kernels import KernelCase, Launch
from kernels.expert_plan.naive import plan_experts
from kernels.experts import naive, triton
from kernels.experts.naive import slot_table
from kernels.experts.tiles import candidates, shape_name
from kernels.experts.work import ExpertWork
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows, quantise_rows
from kernels.target import current
from tests.kernel_checks import error_ratio

Stack = Tensor | Fp8Blocks
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    inter: int
    experts: int
    topk: int
    fp8: bool

    @property
    def expert_bytes(self) -> float:
        elements = 3 * self.hidden * self.inter
        return elements * (1 + 4 / GROUP**2) if self.fp8 else 2 * elements


R1 = Shape("R1, fp8", 7168, 2048, 256, 8, True)
V2_LITE = Shape("V2-Lite, bf16", 2048, 1408, 64, 6, False)


@cache
def stacks(shape: Shape) -> tuple[Stack, Stack]:
    """gate_up and down of every expert: 11.3 GB of R1's, so all cases of a shape share them. `free` drops them."""

    def one(rows: int, columns: int) -> Stack:
        data = torch.empty(shape.experts, columns, rows, device="cuda", dtype=current().fp8 if shape.fp8 else BF16)
        for expert in data:
            noise = torch.randn(columns, rows, device="cuda")
            expert.copy_(noise if shape.fp8 else noise / rows**0.5)
        if not shape.fp8:
            return data.mT
        scale = torch.rand(shape.experts, columns // GROUP, rows // GROUP, device="cuda") + 0.5
        return Fp8Blocks(data.mT, (scale / rows**0.5).mT)

    return one(shape.hidden, 2 * shape.inter), one(shape.inter, shape.hidden)


def free() -> None:
    stacks.cache_clear()
    torch.cuda.empty_cache()


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # bf16 [T, hidden]
    coded: Fp8Rows | None
    ids: Tensor  # int32 [T, topk]
    weights: Tensor


@cache
def choices(shape: Shape, tokens: int) -> list[Tensor]:
    """Uniform routing, fresh for each set of inputs; on the CPU, so that the bytes are known without a GPU."""
    sets = 8 if tokens < 8 else 4 if tokens < 1024 else 2
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.rand(tokens, shape.experts, generator=generator).argsort(1)[:, : shape.topk].int() for _ in range(sets)
    ]


def inputs(shape: Shape, tokens: int) -> list[Inputs]:
    def one(ids: Tensor) -> Inputs:
        x, weights = torch.randn(tokens, shape.hidden, device="cuda").to(BF16), torch.rand(ids.shape, device="cuda")
        coded = None
        if shape.fp8:
            coded = Fp8Rows.empty(tokens, shape.hidden, "cuda", current().fp8)
            quantise_rows(x, coded)
        return Inputs(x, coded, ids.cuda(), weights)

    return [one(ids) for ids in choices(shape, tokens)]


def planned(shape: Shape, given: Inputs, tile: dict | None, dtype: torch.dtype = BF16) -> ExpertWork:
    tokens = len(given.x)
    work = ExpertWork.empty(
        tokens, shape.topk, shape.experts, shape.hidden, shape.inter, shape.fp8, "cuda", dtype, tile
    )
    slots = slot_table({e: e for e in range(shape.experts)}, shape.experts).cuda()
    plan_experts(given.ids, slots, shape.experts, work.plan)
    return work


def ours(shape: Shape, tokens: int, tile: dict | None) -> list[Launch]:
    gate_up, down = stacks(shape)

    def one(given: Inputs) -> Launch:
        work, out, x = planned(shape, given, tile), torch.empty_like(given.x), given.coded or given.x
        return lambda: triton.sum_slots(triton.grouped_ffn(x, given.weights, gate_up, down, work), out)

    return [one(given) for given in inputs(shape, tokens)]


def error(shape: Shape, tokens: int) -> float:
    gate_up, down = stacks(shape)
    given = inputs(shape, tokens)[0]
    work, out, x = planned(shape, given, None), torch.empty_like(given.x), given.coded or given.x
    triton.sum_slots(triton.grouped_ffn(x, given.weights, gate_up, down, work), out)
    wide = planned(shape, given, dict(work.tile), torch.float32)
    return error_ratio(out, naive.grouped_ffn(x, given.weights, gate_up, down, wide).sum())


def vllm(shape: Shape, tokens: int) -> list[Launch]:
    """Quantises the activations itself, and aligns the routing to its blocks."""
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    gate_up, down = stacks(shape)
    w1, w2, config = gate_up.data.mT, down.data.mT, FUSED_MOE_UNQUANTIZED_CONFIG
    if isinstance(gate_up, Fp8Blocks) and isinstance(down, Fp8Blocks):
        config = fp8_w8a8_moe_quant_config(gate_up.scale.mT, down.scale.mT, block_shape=[GROUP, GROUP])

    def one(given: Inputs) -> Launch:
        return lambda: fused_experts(given.x, w1, w2, given.weights, given.ids, quant_config=config)

    return [one(given) for given in inputs(shape, tokens)]


def torch_grouped(shape: Shape, tokens: int) -> list[Launch]:
    """The two products alone, on rows that are sorted already: no SwiGLU, no sum; in fp8 with a scale a row."""
    gate_up, down = stacks(shape)

    def one(given: Inputs) -> Launch:
        pairs = given.ids.numel()
        counts = torch.bincount(given.ids.flatten(), minlength=shape.experts)
        ends = counts.cumsum(0).int()
        if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
            x, act = (torch.randn(pairs, n, device="cuda").to(BF16) for n in (shape.hidden, shape.inter))

            def products() -> None:
                torch._grouped_mm(x, gate_up, offs=ends)
                torch._grouped_mm(act, down, offs=ends)

            return products
        assert isinstance(gate_up, Fp8Blocks) and isinstance(down, Fp8Blocks)
        data = gate_up.data, down.data
        rows = [torch.randn(pairs, len(w[0]), device="cuda").to(w.dtype) for w in data]
        ones = torch.ones(pairs, device="cuda")
        columns = [torch.ones(shape.experts, w.shape[2], device="cuda") for w in data]

        def scaled_products() -> None:
            for x8, w8, scale in zip(rows, data, columns, strict=True):
                torch._scaled_grouped_mm(x8, w8, ones, scale, offs=ends, out_dtype=BF16, use_fast_accum=True)

        return scaled_products

    return [one(given) for given in inputs(shape, tokens)]


def moved(shape: Shape, tokens: int) -> float:
    """Weights of the experts touched, each once, and what goes between the launches, written and read."""
    sets = choices(shape, tokens)
    touched = sum(len(ids.unique()) for ids in sets) / len(sets)
    width, pairs = 1 if shape.fp8 else 2, tokens * shape.topk
    rows = width * (tokens * shape.hidden + 2 * pairs * shape.inter) + 2 * (2 * pairs + tokens) * shape.hidden
    return touched * shape.expert_bytes + rows


def case(shape: Shape, tokens: int, goal: str) -> KernelCase:
    topk, experts, hidden, inter, fp8 = shape.topk, shape.experts, shape.hidden, shape.inter, shape.fp8
    peers: dict[str, Callable[[], list[Launch]]] = {"vllm": lambda: vllm(shape, tokens)}
    if tokens >= 16:
        peers["torch grouped_mm, products alone"] = lambda: torch_grouped(shape, tokens)
    return KernelCase(
        "experts",
        f"{shape.name}, {tokens} tokens",
        lambda tile: ours(shape, tokens, tile),
        bytes=moved(shape, tokens),
        flops=6.0 * tokens * topk * hidden * inter,
        kind="fp8" if fp8 else "bf16",
        tiles=lambda: candidates(tokens, topk, experts, fp8),
        tuned=("experts", shape_name(topk, experts, hidden, inter, fp8), tokens) if tokens > 128 else None,
        check=lambda: error(shape, tokens),
        peers=peers,
        goal=goal,
    )


def cases() -> list[KernelCase]:
    decode, peer = "0.92 of read", "no slower than vllm"
    prefill = {1024: peer, 4096: "550 TFLOPS", 16384: "800 TFLOPS"}
    found = [case(R1, tokens, prefill.get(tokens, decode)) for tokens in (1, 4, 8, 16, 32, 64, 128, *prefill)]
    lite = {1024: peer, 8192: peer}
    return found + [case(V2_LITE, tokens, lite.get(tokens, decode)) for tokens in (1, 4, 8, 16, 64, 128, *lite)]

"""MLA prefill: expanding a step's latents, attention over what was expanded, and both as a layer calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import KernelCase, Launch
from common.pages import PAGE
from kernels.mla_prefill import naive
from kernels.mla_prefill.plan import PrefillPlan, PrefillScratch
from kernels.mla_prefill.triton import attend, candidates, gather, joint, mla_prefill, shape_key

NOPE, ROPE, V_DIM, KV_LORA = 128, 64, 128, 512
SCALE = (NOPE + ROPE) ** -0.5
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    model: str
    name: str
    heads: int
    chunks: tuple[tuple[int, int], ...]  # (rows, tokens of context before them)

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.chunks)

    @property
    def tokens(self) -> int:
        return sum(rows + before for rows, before in self.chunks)

    @property
    def attention_flops(self) -> float:
        pairs = sum(rows * before + rows * (rows + 1) // 2 for rows, before in self.chunks)
        return 2.0 * self.heads * (NOPE + ROPE + V_DIM) * pairs

    @property
    def expansion_flops(self) -> float:
        return 2.0 * self.tokens * KV_LORA * self.heads * (NOPE + V_DIM)

    def sets(self) -> int:
        """Activations are as warm in the engine as the L2 lets them: some sets of small shapes, one of large ones."""
        return max(1, min(4, (256 << 20) // (2 * self.heads * (self.rows * 320 + self.tokens * 256))))

    def plan(self) -> PrefillPlan:
        contexts = [rows + before for rows, before in self.chunks]
        counts = [-(-context // PAGE) for context in contexts]
        return PrefillPlan.of(
            [rows for rows, _ in self.chunks], contexts, torch.randperm(sum(counts)).split(counts), "cuda"
        )


@dataclass(frozen=True)
class Inputs:
    """One layer's, on the GPU."""

    plan: PrefillPlan
    q: Tensor
    out: Tensor
    weights: Tensor  # [heads, nope + v_dim, kv_lora]
    cache: Tensor
    scratch: PrefillScratch

    @property
    def kv(self) -> Tensor:
        """[tokens, heads, nope + v_dim]"""
        return self.scratch.expanded.view(self.plan.tokens, -1, NOPE + V_DIM)


def inputs(shape: Shape) -> Inputs:
    def random(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=BF16)

    plan = shape.plan()
    scratch = PrefillScratch.empty(plan.tokens, shape.heads, NOPE + V_DIM, KV_LORA, ROPE, BF16, "cuda")
    for part in (scratch.latent, scratch.rope, scratch.expanded):
        part.normal_()
    return Inputs(
        plan,
        random(shape.rows, shape.heads, NOPE + ROPE),
        random(shape.rows, shape.heads, V_DIM),
        random(shape.heads, NOPE + V_DIM, KV_LORA) / KV_LORA**0.5,
        random(sum(-(-(rows + before) // PAGE) for rows, before in shape.chunks), PAGE, KV_LORA + ROPE),
        scratch,
    )


def attention(tile: dict | None, x: Inputs) -> Launch:
    return lambda: attend(x.q, x.kv, x.scratch.rope, x.plan, SCALE, x.out, tile)


def expansion(tile: dict | None, x: Inputs) -> Launch:
    weights, kv = joint(x.weights[:, :NOPE], x.weights[:, NOPE:].mT), x.kv.flatten(1)

    def launch() -> None:
        gather(x.cache, KV_LORA, x.plan, x.scratch)
        torch.mm(x.scratch.latent, weights, out=kv)

    return launch


def both(tile: dict | None, x: Inputs) -> Launch:
    up = x.weights[:, :NOPE], x.weights[:, NOPE:].mT
    return lambda: mla_prefill(x.q, *up, x.cache, x.plan, SCALE, x.out, x.scratch, tile)


def error(shape: Shape) -> float:
    """Of eight heads, whose scores naive can hold."""
    x = inputs(Shape(shape.model, shape.name, 8, shape.chunks))
    both(None, x)()
    w, want = x.weights.float(), torch.empty_like(x.out, dtype=torch.float32)
    naive.mla_prefill(x.q.float(), w[:, :NOPE], w[:, NOPE:].mT, x.cache.float(), x.plan, SCALE, want)
    return float((x.out.float() - want).square().mean().sqrt() / want.square().mean().sqrt())


# ---- peers


def fa3(x: Inputs) -> Callable[[Tensor, Tensor], object]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    most = int(x.plan.contexts.max())
    return lambda k, v: flash_attn_varlen_func(
        q=x.q, k=k, v=v, max_seqlen_q=x.plan.most_rows, cu_seqlens_q=x.plan.cu_rows, max_seqlen_k=most,
        cu_seqlens_k=x.plan.cu_contexts, softmax_scale=SCALE, causal=True, fa_version=3, out=x.out,
    )  # fmt: skip


def keys(x: Inputs) -> Tensor:
    rope = x.scratch.rope[:, None].expand(-1, x.q.shape[1], -1)
    return torch.cat((x.kv[..., :NOPE], rope), 2)


def fa3_attention(x: Inputs) -> Launch:
    run, k, v = fa3(x), keys(x), x.kv[..., NOPE:]
    return lambda: run(k, v)


def fa3_both(x: Inputs) -> Launch:
    """As vLLM does it: the product, keys copied together with the rope part, attention; without reading the cache."""
    run, weights, kv = fa3(x), x.weights.flatten(0, 1).T, x.kv.flatten(1)

    def launch() -> None:
        torch.mm(x.scratch.latent, weights, out=kv)
        run(keys(x), x.kv[..., NOPE:])

    return launch


def sdpa(x: Inputs) -> Launch:
    q, k, v = (part.transpose(0, 1)[None] for part in (x.q, keys(x), x.kv[..., NOPE:]))
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)


def flashinfer(x: Inputs) -> Launch:
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    wrapper = BatchPrefillWithRaggedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), "NHD")
    heads, k, v = x.q.shape[1], keys(x), x.kv[..., NOPE:].contiguous()
    wrapper.plan(
        x.plan.cu_rows, x.plan.cu_contexts, heads, heads, NOPE + ROPE, head_dim_vo=V_DIM, causal=True, sm_scale=SCALE,
        q_data_type=BF16,
    )  # fmt: skip
    return lambda: wrapper.run(x.q, k, v, out=x.out)


# ---- cases


def cases_of(shape: Shape) -> list[KernelCase]:
    def made(one: Callable[[Inputs], Launch]) -> list[Launch]:
        return [one(inputs(shape)) for _ in range(shape.sets())]

    def make(one: Callable[[dict | None, Inputs], Launch]) -> Callable[[dict | None], list[Launch]]:
        return lambda tile: made(partial(one, tile))

    def peers(**those: Callable[[Inputs], Launch]) -> dict[str, Callable[[], list[Launch]]]:
        return {name.replace("_", " "): partial(made, one) for name, one in those.items()}

    name = f"{shape.model}, {shape.name}"
    prefix = shape.tokens > shape.rows  # these share a bucket with others
    square = {"torch_SDPA": sdpa} if len(shape.chunks) == 1 and not prefix else {}
    return [
        KernelCase(
            "mla_prefill", f"{name}, attention", make(attention), flops=shape.attention_flops, kind="bf16",
            tiles=partial(candidates, shape.heads, shape.tokens),
            tuned=None if prefix else ("mla_prefill", shape_key(BF16, NOPE, ROPE, V_DIM, shape.heads), shape.tokens),
            peers=peers(FA3=fa3_attention, flashinfer=flashinfer, **square), goal=">= FA3",
        ),
        KernelCase(
            "mla_prefill", f"{name}, expansion", make(expansion), flops=shape.expansion_flops, kind="bf16",
            bytes=2.0 * shape.heads * (NOPE + V_DIM) * (shape.tokens + KV_LORA),
        ),
        KernelCase(
            "mla_prefill", f"{name}, both", make(both), flops=shape.attention_flops + shape.expansion_flops,
            kind="bf16", check=partial(error, shape), peers=peers(FA3_as_in_vLLM=fa3_both), goal="1.1x vLLM",
        ),
    ]  # fmt: skip


def cases() -> list[KernelCase]:
    ragged = tuple((n, 0) for n in (1024, 870, 995, 829, 1001, 921, 1024, 848))
    return [
        case
        for model, heads in (("R1", 128), ("V2-Lite", 16))
        for name, chunks in (
            ("1024 x 1", ((1024, 0),)),
            ("1024 x 8, ragged", ragged),
            ("8192 x 1", ((8192, 0),)),
            ("2048 after 6144", ((2048, 6144),)),
        )
        for case in cases_of(Shape(model, name, heads, chunks))
    ]

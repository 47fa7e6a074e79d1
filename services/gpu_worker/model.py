"""DeepSeek V2 and V3: latent attention, a dense or sparse FFN, one step for a batch of decodes and prefill chunks.

One code for both devices: on the CPU float32 and the naive kernels, on a GPU bf16 or fp8 and Triton's. There nothing
is read back and nothing allocated in a pass, so that one of decodes alone can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.link import ExpertLink
from common.model_config import ModelConfig
from common.pages import PAGE
from kernels.combine_norm import SlotRows, combine_norm
from kernels.embed import embed
from kernels.experts import ExpertWork, grouped_ffn
from kernels.latent_cache import Fp8Latent
from kernels.linear import LinearScratch, linear
from kernels.mla_decode import DecodeMask, mla_decode, plan_decode
from kernels.mla_prefill import MOST_CHUNKS, PrefillPlan, PrefillScratch, mla_prefill
from kernels.qkv_norm_rope_write import qkv_norm_rope_write
from kernels.quant import Fp8Blocks, Fp8Rows, quantise_rows
from kernels.route import RouteScratch, Routing, route
from services.gpu_worker.batch import Batch, Chunk
from services.gpu_worker.device_link import DeviceLink
from services.gpu_worker.weights import Layer, Mlp, Weights, rope_turns
from services.gpu_worker.work import GpuWork, MlpWork, Work

Parts = tuple[Tensor | SlotRows, ...]  # what the next norm adds to the residual stream first
Cache = Sequence[Tensor | Fp8Latent]  # a layer's pages each


class Stack(Protocol):
    """A layer's routed experts where they are in this process, and before them the shared ones, unless those are among
    the worker's own weights."""

    @property
    def gate_up(self) -> Tensor | Fp8Blocks: ...  # [held, hidden, 2 * inter]
    @property
    def down(self) -> Tensor | Fp8Blocks: ...  # [held, inter, hidden]
    @property
    def slots(self) -> Tensor: ...  # [experts + shared + 1]


class Model:
    """Holds every weight but the routed experts', which it reaches through `link` (on a GPU `device_link`), or finds in
    `stacks`, by layer.

    Shared experts in the stacks ride along with the routed ones, in the same launches and the same sum. Where they are
    computed apart, as they are beside a link, sums are rounded as a link with one shard rounds them.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        link: ExpertLink | None = None,
        stacks: Mapping[int, Stack] | None = None,
        device_link: DeviceLink | None = None,
    ) -> None:
        self.config = config
        self.link = link
        self.device_link = device_link
        self.stacks = stacks
        self.weights = weights
        self.dtype = weights.embedding.dtype
        self.on_gpu = weights.embedding.is_cuda
        self.fp8 = isinstance(weights.layers[0].o, Fp8Blocks)
        self._codes_heads = False
        if self.on_gpu and self.fp8:
            from kernels.mla_decode.triton import codes_heads

            self._codes_heads = codes_heads(config.kv_lora, config.v_dim)
        apart = any(layer.mlp is not None for layer in weights.layers if layer.w_gate is not None)
        self._riding = config.shared_experts if stacks and not apart else 0
        self._turns = rope_turns(config, config.max_positions).to(weights.embedding.device)  # [positions, rope / 2]
        self._routing = Routing(
            topk=config.topk,
            scoring=config.scoring,
            method=config.topk_method,
            groups=config.groups,
            topk_groups=config.topk_groups,
            norm=config.norm_topk,
            scale=config.routed_scale,
            shared=self._riding,
        )

    def new_cache(self, pages: int, fp8: bool = False) -> Cache:
        """One [pages, PAGE, kv_lora + rope] a layer; a row is the normed latent, then the rotated key."""
        c, layers = self.config, range(len(self.weights.layers))
        if fp8:
            from kernels.latent_cache import page_bytes

            size = pages, page_bytes(c.kv_lora, c.rope)
            planes = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in layers]
            return [Fp8Latent.of(plane, c.kv_lora, c.rope) for plane in planes]
        shape = pages, PAGE, c.latent
        if self.on_gpu:
            return [torch.zeros(shape, dtype=self.dtype, device="cuda") for _ in layers]
        # numpy's zeros are pages the kernel hands out when they are first written; torch's are written at once.
        return [torch.from_numpy(np.zeros(shape, np.float32)) for _ in layers]

    def new_work(
        self, rows: int, *, decodes: int = 0, context: int = 0, fp8_cache: bool = False,
        new: Callable[..., Tensor] = torch.empty,
    ) -> Work:  # fmt: skip
        """For passes of exactly `rows` rows, of which `decodes` decode; their prefill has up to `context` tokens in the
        cache, all chunks together. `new`: instead of torch.empty, for what keeps nothing from one pass to the next."""
        chosen = self._routing.topk + self._routing.shared
        device = "cuda" if self.on_gpu else "cpu"
        gpu = self._gpu_work(rows, decodes, context, fp8_cache, new) if self.on_gpu else None
        return Work.empty(rows, self.config, self.dtype, chosen, device, gpu, new)

    @torch.inference_mode()
    def hidden(self, batch: Batch, cache: Cache, work: Work | None = None) -> Tensor:
        """[T, hidden] after the last layer and norm: work.x. Raises PeerLost; then the step can be run again."""
        work = work or self.new_work(len(batch.tokens))
        attend = self.attention(batch, cache, work)
        for layer in self.around_attention(batch, cache, work):
            attend(layer)
        return work.x

    def around_attention(self, batch: Batch, cache: Cache, work: Work) -> Iterator[int]:
        """A pass without its attention: yields the number of each layer whose attention is to read work.q and to write
        work.out, or in 8 bits work.gpu.attended (see `attention`). On a GPU what is launched between two of them
        depends on the number of rows alone, and on whether they are prefill."""
        weights, eps, feed = self.weights, self.config.eps, batch.feed
        if feed is None:
            torch.index_select(weights.embedding, 0, batch.tokens, out=work.h)
        else:
            embed(batch.tokens, feed.source, feed.sampled, weights.embedding, work.h)
        turns: tuple[Tensor, Tensor | None] = self._turns, batch.positions
        if not self.on_gpu:  # whose kernel looks them up itself
            turns = self._turns[batch.positions].unsqueeze(1), None
        parts: Parts = ()
        for index, (layer, layer_cache) in enumerate(zip(weights.layers, cache, strict=True)):
            x = self._normed(parts, layer.attn_norm, work)
            scratch = work.gpu.qkv if work.gpu else None
            qkv_norm_rope_write(x, layer.qkv, turns[0], batch.write, layer_cache, work.q, turns[1], scratch)
            yield index
            self._add_attended(layer, work, coded=self._decodes_to_8_bits(batch))
            parts = self._ffn(layer, work, bool(batch.prefill))
        combine_norm(work.h, parts, weights.norm, eps, work.x)

    def attention(
        self, batch: Batch, cache: Cache, work: Work, scratch: PrefillScratch | None = None
    ) -> Callable[[int], None]:
        """What computes that of a layer, for `around_attention`. `batch` may have fewer rows than `work`, and its
        tensors may be the host's where none decodes. `scratch`: instead of what `work` has."""
        if scratch is None and work.gpu is not None:
            scratch = work.gpu.prefill
        room = len(scratch.latent) if scratch is not None else 0
        decode, prefill = _decode_schedule(batch, work), _prefill_plans(batch.prefill, room, work.q.device)
        n, scale = batch.n_decode, self.config.softmax_scale
        coded = work.gpu.attended if work.gpu and self._decodes_to_8_bits(batch) else None

        def attend(index: int) -> None:
            layer, pages, q, out = self.weights.layers[index], cache[index], work.q, work.out
            up = layer.w_uk, layer.w_uv
            if n:
                to = out[:n] if coded is None else coded[:n]
                mla_decode(q[:n], *up, pages, batch.block_table, batch.context, decode, scale, to)  # type: ignore[arg-type]
            for first, end, plan in prefill:
                mla_prefill(q[first:end], *up, pages, plan, scale, out[first:end], scratch)

        return attend

    @torch.inference_mode()
    def logits(self, x: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """[rows, vocab] of these rows of `hidden`, or all of them, in the weights' dtype."""
        x = x if rows is None else x[rows]
        head = self.weights.head
        if out is None:
            out = x.new_empty(len(x), head.shape[1])
        linear(x, head, out)
        return out

    def _normed(self, parts: Parts, weight: Tensor, work: Work) -> Tensor | Fp8Rows:
        """The residual stream with `parts` in it, normed, as the products of a layer take it."""
        out: Tensor | Fp8Rows = work.x
        if self.fp8:
            assert work.gpu is not None and work.gpu.coded is not None
            out = work.gpu.coded
        combine_norm(work.h, parts, weight, self.config.eps, out)
        return out

    def _decodes_to_8_bits(self, batch: Batch) -> bool:
        """Whether what attention finds is in 8 bits already: beside prompts, which have no such kernel, it is coded
        together with theirs."""
        return self._codes_heads and not batch.prefill

    def _add_attended(self, layer: Layer, work: Work, coded: bool) -> None:
        """h += what attention found, projected. `coded`: it is in 8 bits."""
        out, gpu = work.out, work.gpu
        attended: Tensor | Fp8Rows = out.view(len(out), -1)
        if gpu is not None and gpu.attended is not None:
            if not coded:
                quantise_rows(out.view(len(out), -1), gpu.attended)
            attended = gpu.attended
        linear(attended, layer.o, work.h, add=work.h, scratch=gpu.linear if gpu else None)
        if layer.o_bias is not None:
            work.h.add_(layer.o_bias)

    def _ffn(self, layer: Layer, work: Work, prefill: bool) -> Parts:
        """h += ffn(x), or what the next norm is to add; the routed experts' part through the link while the shared
        expert is computed here."""
        gpu = work.gpu
        if layer.w_gate is None:
            x = self._normed((), layer.mlp_norm, work)
            return _mlp(layer.mlp, x, gpu.dense if gpu else None, work)
        combine_norm(work.h, (), layer.mlp_norm, self.config.eps, work.x, gpu.coded if gpu else None)
        if gpu is not None:
            return self._experts_on_gpu(layer, work, gpu, prefill)
        assert self.link is not None
        self._route(layer, work)
        self.link.dispatch(layer.index, work.x, work.ids, work.weights)
        parts = _mlp(layer.mlp, work.x, None, work)
        self.link.combine(work.h)
        return parts

    def _experts_on_gpu(self, layer: Layer, work: Work, gpu: GpuWork, prefill: bool) -> Parts:
        coded: Tensor | Fp8Rows = work.x if gpu.coded is None else gpu.coded  # if anybody takes it so
        if self.stacks:
            assert gpu.experts is not None
            stack = self.stacks[layer.index]
            self._route(layer, work, gpu.experts.plan, stack.slots, len(stack.down.data))
            parts = _mlp(layer.mlp, coded if self.fp8 else work.x, gpu.shared, work)
            x = coded if isinstance(stack.down, Fp8Blocks) else work.x
            return (*parts, grouped_ffn(x, work.weights, stack.gate_up, stack.down, gpu.experts))
        link, slots = self.device_link, gpu.slots
        assert link is not None and slots is not None
        self._route(layer, work)
        x = coded if link.layout.quantised else work.x
        link.dispatch(layer.index, x, work.ids, work.weights, slots, prefill=prefill)
        parts = _mlp(layer.mlp, coded if self.fp8 else work.x, gpu.shared, work)
        return (*parts, link.wait(slots))

    def _route(self, layer: Layer, work: Work, plan: object = None, slots: Tensor | None = None, held: int = 0) -> None:
        assert layer.w_gate is not None
        route(
            work.x, layer.w_gate, layer.gate_bias, self._routing, work.ids, work.weights,
            plan, slots, held, work.gpu.route if work.gpu else None,  # type: ignore[arg-type]
        )  # fmt: skip

    def _gpu_work(self, rows: int, decodes: int, context: int, fp8_cache: bool, new: Callable[..., Tensor]) -> GpuWork:
        from kernels.experts.tiles import parts_of
        from kernels.mla_decode.triton import decode_plan
        from kernels.qkv_norm_rope_write.triton import QkvScratch
        from kernels.target import current

        c, dtype, coded = self.config, self.dtype, current().fp8
        scratch = self._linear_scratch

        def rows8(width: int) -> Fp8Rows:
            return Fp8Rows.empty(rows, width, "cuda", coded, new)

        def mlp(inter: int, layer: Layer | None, cut: bool) -> MlpWork | None:
            if layer is None or layer.mlp is None:
                return None
            fp8 = isinstance(layer.mlp.down, Fp8Blocks)
            parts = parts_of(rows, c.hidden, inter, fp8, dtype) if cut else 1
            return MlpWork.empty(rows, c.hidden, inter, fp8, dtype, parts, new)

        dense = next((layer for layer in self.weights.layers if layer.w_gate is None), None)
        sparse = next((layer for layer in self.weights.layers if layer.w_gate is not None), None)
        experts = None
        if self.stacks:
            stack = next(iter(self.stacks.values()))
            experts = ExpertWork.empty(
                rows, c.topk + self._riding, len(stack.down.data), c.hidden, c.moe_inter,
                isinstance(stack.down, Fp8Blocks), "cuda", dtype, shared=self._riding, new=new,
            )  # fmt: skip
        q_low: Tensor | Fp8Rows | None = None
        if c.q_lora:
            q_low = rows8(c.q_lora) if self.fp8 else new(rows, c.q_lora, dtype=dtype, device="cuda")
        width = self.weights.layers[0].qkv.a.data.shape[1]
        link = self.device_link
        any_fp8 = self.fp8 or (experts is not None and isinstance(experts.act, Fp8Rows))
        any_fp8 = any_fp8 or (link is not None and link.layout.quantised)
        return GpuWork(
            linear=scratch,
            qkv=QkvScratch(new(rows, width, dtype=dtype, device="cuda"), q_low, scratch),
            route=RouteScratch.empty(rows, c.experts + self._riding, "cuda", new) if sparse else None,
            decode=decode_plan(decodes, 1, c.heads, c.kv_lora, c.rope, dtype, "cuda", fp8=fp8_cache)
            if decodes
            else None,
            prefill=self.prefill_scratch(context) if context else None,
            dense=mlp(c.inter, dense, cut=True),
            shared=mlp(c.shared_experts * c.moe_inter, sparse, cut=False),  # whose sum comes beside the shards' rows
            experts=experts,
            slots=link.new_slots(rows) if link is not None else None,
            coded=rows8(c.hidden) if any_fp8 else None,
            attended=rows8(c.heads * c.v_dim) if self.fp8 else None,
        )

    def prefill_scratch(self, tokens: int) -> PrefillScratch:
        """For chunks that have up to so many tokens in the cache, all together."""
        c = self.config
        return PrefillScratch.empty(tokens, c.heads, c.nope + c.v_dim, c.kv_lora, c.rope, self.dtype, "cuda")

    def abridged(self) -> Model:
        """What launches every kernel that this one does, with a dense layer and a sparse one; or two, where a link's
        rows lie in two places by turns."""
        layers = self.weights.layers
        dense = [layer for layer in layers if layer.w_gate is None][:1]
        sparse = [layer for layer in layers if layer.w_gate is not None][: 2 if self.device_link else 1]
        few = copy(self)
        few.weights = replace(self.weights, layers=(*dense, *sparse))
        return few

    @cached_property
    def _linear_scratch(self) -> LinearScratch:
        """One serves all passes: they are on one stream."""
        return LinearScratch.empty("cuda")


def _mlp(mlp: Mlp | None, x: Tensor | Fp8Rows, given: MlpWork | None, work: Work) -> Parts:
    """h += (silu(x gate) * (x up)) down"""
    if mlp is None:
        return ()
    if given is not None:
        part = grouped_ffn(x, given.weights, _only(mlp.gate_up), _only(mlp.down), given.experts)
        if given.weights.shape[1] > 1:
            return (part,)
        return (part.rows[: len(work.h)],)  # every token in its own place
    assert isinstance(x, Tensor) and isinstance(mlp.gate_up, Tensor) and isinstance(mlp.down, Tensor)
    gate, up = torch.mm(x, mlp.gate_up).split(len(mlp.down), 1)
    work.h.addmm_(F.silu(gate).mul_(up), mlp.down)
    return ()


def _only(w: Tensor | Fp8Blocks) -> Tensor | Fp8Blocks:
    """A stack of one."""
    return Fp8Blocks(w.data[None], w.scale[None]) if isinstance(w, Fp8Blocks) else w[None]


def _decode_schedule(batch: Batch, work: Work) -> object:
    """Which program reads which pages, of all layers."""
    if work.gpu is None:
        mask: DecodeMask = plan_decode(batch.context, batch.block_table.shape[1])
        return mask
    if work.gpu.decode is not None:
        from kernels.mla_decode.triton import plan_decode as plan_on_gpu

        plan_on_gpu(batch.context, work.gpu.decode)
    return work.gpu.decode


def _prefill_plans(
    chunks: Sequence[Chunk], room: int, device: torch.device | str
) -> list[tuple[int, int, PrefillPlan]]:
    """(first row, the one after the last, plan) of chunks that together have up to `room` tokens in the cache, or are
    one; 0: of all."""
    groups: list[list[Chunk]] = []
    left = 0
    for chunk in chunks:
        if not groups or (room and chunk.context > left) or len(groups[-1]) == MOST_CHUNKS:
            groups.append([])
            left = room
        groups[-1].append(chunk)
        left -= chunk.context
    return [
        (some[0].start, some[-1].start + some[-1].rows,
         PrefillPlan.of([c.rows for c in some], [c.context for c in some], [c.pages for c in some], device))
        for some in groups
    ]  # fmt: skip

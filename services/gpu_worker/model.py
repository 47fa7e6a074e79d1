"""DeepSeek V2 and V3: latent attention, a dense or sparse FFN, one step for a batch of decodes and prefill chunks."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.link import ExpertLink
from common.model_config import ModelConfig
from common.pages import PAGE
from common.source import Source
from kernels.combine_norm import combine_norm
from kernels.mla_decode import DecodeMask, mla_decode, plan_decode
from kernels.mla_prefill import PrefillPlan, mla_prefill
from kernels.qkv_norm_rope_write import qkv_norm_rope_write
from kernels.route import Routing, route
from services.gpu_worker.batch import Batch
from services.gpu_worker.weights import Layer, Mlp, load_weights, rope_turns


class Model:
    """Holds every weight but the routed experts', which it reaches through `link`."""

    def __init__(self, config: ModelConfig, source: Source, link: ExpertLink, *, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.link = link
        self.weights = load_weights(config, source)
        self._turns = rope_turns(config, config.max_positions)  # [max_positions, rope / 2]
        self._routing = Routing(
            topk=config.topk,
            scoring=config.scoring,
            method=config.topk_method,
            groups=config.groups,
            topk_groups=config.topk_groups,
            norm=config.norm_topk,
            scale=config.routed_scale,
        )

    def new_cache(self, pages: int) -> list[Tensor]:
        """One [pages, PAGE, kv_lora + rope] a layer; a row is the normed latent, then the rotated key."""
        # numpy's zeros are pages the kernel hands out when they are first written; torch's are written at once.
        shape = pages, PAGE, self.config.latent
        return [torch.from_numpy(np.zeros(shape, np.float32)) for _ in range(self.config.layers)]

    @torch.inference_mode()
    def hidden(self, batch: Batch, cache: list[Tensor]) -> Tensor:
        """[T, hidden], the residual stream after the last layer. Raises PeerLost; then the step can be run again."""
        h = F.embedding(batch.tokens, self.weights.embedding)  # [T, hidden], the residual stream
        x = torch.empty_like(h)
        turns = self._turns[batch.positions].unsqueeze(1)  # [T, 1, rope / 2]
        decode, prefill = plan_decode(batch.context, batch.block_table.shape[1]), _prefill_plan(batch)
        for layer, layer_cache in zip(self.weights.layers, cache, strict=True):
            combine_norm(h, (), layer.attn_norm, self.config.eps, x)
            self._attention(layer, x, turns, decode, prefill, batch, layer_cache, h)
            combine_norm(h, (), layer.mlp_norm, self.config.eps, x)
            self._ffn(layer, x, h)
        return h

    @torch.inference_mode()
    def logits(self, h: Tensor, rows: Tensor) -> Tensor:
        """float32 [rows, vocab] of these rows of `hidden`."""
        last = h[rows]
        combine_norm(last, (), self.weights.norm, self.config.eps, last)
        return torch.mm(last, self.weights.head)

    def _attention(
        self,
        layer: Layer,
        x: Tensor,
        turns: Tensor,
        decode: DecodeMask,
        prefill: PrefillPlan | None,
        batch: Batch,
        cache: Tensor,
        h: Tensor,
    ) -> None:
        """h += attention(x)"""
        c, n = self.config, batch.n_decode
        q = x.new_empty(len(x), c.heads, c.nope + c.rope)
        out = x.new_empty(len(x), c.heads, c.v_dim)
        qkv_norm_rope_write(x, layer.qkv, turns, batch.write, cache, q)
        up = layer.w_uk, layer.w_uv
        if n:
            mla_decode(q[:n], *up, cache, batch.block_table, batch.context, decode, c.softmax_scale, out[:n])
        if prefill is not None:
            mla_prefill(q[n:], *up, cache, prefill, c.softmax_scale, out[n:])
        assert isinstance(layer.o, Tensor)
        h.addmm_(out.view(len(x), -1), layer.o)
        if layer.o_bias is not None:
            h += layer.o_bias

    def _ffn(self, layer: Layer, x: Tensor, h: Tensor) -> None:
        """h += ffn(x), the routed experts' part through the link while the shared expert is computed here."""
        if layer.w_gate is None:
            _add_mlp(layer.mlp, x, h)
            return
        ids = torch.empty(len(x), self.config.topk, dtype=torch.int64)
        weights = x.new_empty(len(x), self.config.topk)
        route(x, layer.w_gate, layer.gate_bias, self._routing, ids, weights)
        self.link.dispatch(layer.index, x, ids, weights)
        _add_mlp(layer.mlp, x, h)
        self.link.combine(h)


def _add_mlp(mlp: Mlp | None, x: Tensor, h: Tensor) -> None:
    """h += (silu(x gate) * (x up)) down"""
    if mlp is not None:
        assert isinstance(mlp.gate_up, Tensor) and isinstance(mlp.down, Tensor)
        gate, up = torch.mm(x, mlp.gate_up).split(len(mlp.down), 1)
        h.addmm_(F.silu(gate).mul_(up), mlp.down)


def _prefill_plan(batch: Batch) -> PrefillPlan | None:
    chunks = batch.prefill
    if not chunks:
        return None
    return PrefillPlan.of([c.rows for c in chunks], [c.context for c in chunks], [c.pages for c in chunks])

"""Every tensor of the model but the routed experts, read from the checkpoint and laid out for the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.model_config import ModelConfig, Yarn
from kernels.qkv_norm_rope_write import QkvWeights


@dataclass(frozen=True)
class Mlp:
    """A gated FFN, input-major."""

    gate_up: Tensor  # [hidden, 2 * inter], gate first
    down: Tensor  # [inter, hidden]


@dataclass(frozen=True)
class Layer:
    index: int
    attn_norm: Tensor  # [hidden]
    qkv: QkvWeights
    w_uk: Tensor  # [heads, nope, kv_lora]
    w_uv: Tensor  # [heads, kv_lora, v_dim]
    o: Tensor  # [heads * v_dim, hidden]
    o_bias: Tensor | None  # [hidden]
    mlp_norm: Tensor  # [hidden]
    mlp: Mlp | None  # a dense layer's FFN, or the shared expert
    w_gate: Tensor | None  # [hidden, experts], the router; None in a dense layer
    gate_bias: Tensor | None  # [experts]


@dataclass(frozen=True)
class Weights:
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [hidden, vocab]


def load_weights(config: ModelConfig, checkpoint: Checkpoint) -> Weights:
    """float32. Raises ConfigError naming a tensor that is missing or has another shape."""
    read = _Reader(config, checkpoint)
    embedding = read("model.embed_tokens.weight", config.vocab, config.hidden)
    head = embedding if config.tie else read("lm_head.weight", config.vocab, config.hidden)
    return Weights(
        embedding=embedding,
        layers=tuple(read.layer(i) for i in range(config.layers)),
        norm=read("model.norm.weight", config.hidden),
        head=_input_major(head),
    )


class _Reader:
    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self.config, self.checkpoint = config, checkpoint

    def __call__(self, name: str, *shape: int) -> Tensor:
        return self.checkpoint.tensor(name, shape).float()

    def layer(self, index: int) -> Layer:
        c, name = self.config, f"model.layers.{index}"
        w_uk, w_uv = self._up_projections(f"{name}.self_attn")
        moe = index in c.moe_layers
        return Layer(
            index=index,
            attn_norm=self(f"{name}.input_layernorm.weight", c.hidden),
            qkv=self._qkv(f"{name}.self_attn"),
            w_uk=w_uk,
            w_uv=w_uv,
            o=_input_major(self(f"{name}.self_attn.o_proj.weight", c.hidden, c.heads * c.v_dim)),
            o_bias=self(f"{name}.self_attn.o_proj.bias", c.hidden) if c.attention_bias else None,
            mlp_norm=self(f"{name}.post_attention_layernorm.weight", c.hidden),
            mlp=self._shared(f"{name}.mlp") if moe else self._mlp(f"{name}.mlp", c.inter),
            w_gate=_input_major(self(f"{name}.mlp.gate.weight", c.experts, c.hidden)) if moe else None,
            gate_bias=self._gate_bias(f"{name}.mlp.gate") if moe else None,
        )

    def _qkv(self, name: str) -> QkvWeights:
        c = self.config
        width = c.nope + c.rope
        order = torch.arange(c.rope) if c.rope_interleave else torch.arange(c.rope).view(2, -1).T.flatten()
        kv_a = self(f"{name}.kv_a_proj_with_mqa.weight", c.latent, c.hidden)
        kv_a[c.kv_lora :] = kv_a[c.kv_lora :][order]
        if c.q_lora:
            q_a, q_b = f"{name}.q_a_proj", self(f"{name}.q_b_proj.weight", c.heads * width, c.q_lora)
            first = self(f"{q_a}.weight", c.q_lora, c.hidden)
        else:
            q_a, q_b = "", self(f"{name}.q_proj.weight", c.heads * width, c.hidden)
            first = q_b
        q_rope = q_b.view(c.heads, width, -1)[:, c.nope :]
        q_rope.copy_(q_rope[:, order])
        bias = None
        if c.attention_bias:
            kv_bias = self(f"{name}.kv_a_proj_with_mqa.bias", c.latent)
            kv_bias[c.kv_lora :] = kv_bias[c.kv_lora :][order]
            bias = torch.cat((kv_bias, self(f"{q_a}.bias", c.q_lora) if q_a else torch.zeros(len(first))))
        return QkvWeights(
            a=_input_major(torch.cat((kv_a, first))),
            a_bias=bias,
            kv_norm=self(f"{name}.kv_a_layernorm.weight", c.kv_lora),
            q_norm=self(f"{name}.q_a_layernorm.weight", c.q_lora) if c.q_lora else None,
            b=_input_major(q_b) if c.q_lora else None,
        )

    def _up_projections(self, name: str) -> tuple[Tensor, Tensor]:
        c = self.config
        kv_b = self(f"{name}.kv_b_proj.weight", c.heads * (c.nope + c.v_dim), c.kv_lora)
        w_uk, w_uv = kv_b.view(c.heads, c.nope + c.v_dim, c.kv_lora).split([c.nope, c.v_dim], 1)
        return w_uk.contiguous(), w_uv.transpose(1, 2).contiguous()

    def _mlp(self, name: str, inter: int) -> Mlp:
        hidden = self.config.hidden
        gate, up = (self(f"{name}.{part}_proj.weight", inter, hidden) for part in ("gate", "up"))
        down = self(f"{name}.down_proj.weight", hidden, inter)
        return Mlp(_input_major(torch.cat((gate, up))), _input_major(down))

    def _shared(self, name: str) -> Mlp | None:
        c = self.config
        return self._mlp(f"{name}.shared_experts", c.shared_experts * c.moe_inter) if c.shared_experts else None

    def _gate_bias(self, name: str) -> Tensor | None:
        if self.config.topk_method != "noaux_tc":
            return None
        return self(f"{name}.e_score_correction_bias", self.config.experts)


def _input_major(weight: Tensor) -> Tensor:
    """[out, in] -> [in, out]: with few rows the product is twice as fast on a CPU."""
    return weight.T.contiguous()


def rope_turns(config: ModelConfig, positions: int) -> Tensor:
    """complex64 [positions, rope / 2]: cos + i sin of each position and pair, YaRN's factor included."""
    frequencies = _frequencies(config)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    factor = config.yarn.attention_factor if config.yarn else 1.0
    return torch.polar(torch.full_like(angles, factor), angles)


def _frequencies(config: ModelConfig) -> Tensor:
    """[rope / 2], radians a position."""
    powers = config.rope_theta ** (torch.arange(0, config.rope, 2, dtype=torch.float32) / config.rope)
    if config.yarn is None:
        return 1.0 / powers
    kept = 1.0 - _yarn_ramp(config.yarn, config.rope, config.rope_theta)
    return (1.0 / (config.yarn.factor * powers)) * (1.0 - kept) + (1.0 / powers) * kept


def _yarn_ramp(yarn: Yarn, dim: int, theta: float) -> Tensor:
    """[rope / 2]: 0 where a pair turns often enough to be left alone, 1 where it is slowed by the whole factor."""

    def pair_with(rotations: float) -> float:
        return dim * math.log(yarn.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp_(0, 1)

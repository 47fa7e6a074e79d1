"""Every tensor of the model but the routed experts, from a source of weights and laid out for the kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from common.model_config import ModelConfig, Yarn
from common.source import Progress, Read, Source, empty, rows_of, transposed
from kernels.qkv_norm_rope_write import QkvWeights
from kernels.quant import GROUP, Fp8Blocks


class Layout(Enum):
    """How weights lie in memory, whichever device that is: as the kernels of a CPU or of a GPU want them."""

    CPU = auto()  # float32, input-major
    GPU = auto()  # as the file has them, bf16 or blocks of 8 bits; input-major as transposed views


@dataclass(frozen=True)
class Mlp:
    """A gated FFN, input-major."""

    gate_up: Tensor | Fp8Blocks  # [hidden, 2 * inter], gate first
    down: Tensor | Fp8Blocks  # [inter, hidden]


@dataclass(frozen=True)
class Layer:
    index: int
    attn_norm: Tensor  # [hidden]
    qkv: QkvWeights
    w_uk: Tensor  # [heads, nope, kv_lora], never in 8 bits; in the GPU's layout w_uk and w_uv are views of one tensor,
    w_uv: Tensor  # [heads, kv_lora, v_dim]                                               [heads, nope + v_dim, kv_lora]
    o: Tensor | Fp8Blocks  # [heads * v_dim, hidden]
    o_bias: Tensor | None  # [hidden]
    mlp_norm: Tensor  # [hidden]
    mlp: Mlp | None  # a dense layer's FFN, or the shared experts
    w_gate: Tensor | None  # [hidden, experts], the router; None in a dense layer
    gate_bias: Tensor | None  # float32 [experts]


@dataclass(frozen=True)
class Weights:
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [hidden, vocab]


def load_weights(
    config: ModelConfig,
    source: Source,
    device: torch.device | str = "cpu",
    *,
    layout: Layout | None = None,
    shared: bool = True,
    progress: Progress | None = None,
) -> Weights:
    """`layout`: the device's, unless given. `shared`: with the shared experts, which else are somebody else's and
    whose layers have no mlp. `progress` is told of bytes as they are held.

    Raises ConfigError naming a tensor that is missing or has another shape, or what cannot be laid out in blocks.
    """
    if layout is None:
        layout = Layout.GPU if torch.device(device).type == "cuda" else Layout.CPU
    return _Loader(config, source, device, layout, shared).load(progress)


class _Kind(Enum):
    """Where a tensor stays in more than 8 bits."""

    LINEAR = auto()  # in a model in bf16
    WIDE = auto()  # always: bf16
    FLOAT = auto()  # always: float32


@dataclass(frozen=True)
class _Part:
    """A tensor to hold, from one or more of the source's, one below the other."""

    names: tuple[tuple[str, int], ...]  # (name, rows)
    columns: int = 0  # 0: a vector
    kind: _Kind = _Kind.WIDE

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.names)


_Plan = dict[str, _Part]
_Held = dict[str, Any]  # Tensor or, in the GPU's layout of a model in fp8 and of kind LINEAR, Fp8Blocks


class _Loader:
    def __init__(
        self, config: ModelConfig, source: Source, device: torch.device | str, layout: Layout, shared: bool
    ) -> None:
        self.config, self.source, self.device, self.shared = config, source, device, shared
        self.gpu = layout is Layout.GPU
        self.width = config.nope + config.rope  # of a head's query
        # Both parts of qkv.a must start at a block, and the latent with the key ends within one.
        self.queries_first = self.gpu and config.fp8

    def load(self, progress: Progress | None) -> Weights:
        plans = [self._outer_plan(), *map(self._layer_plan, range(self.config.layers))]
        held = self._read(plans, progress)
        outer = next(held)
        head = outer["embedding" if self.config.tie else "head"]
        return Weights(
            embedding=outer["embedding"],
            norm=outer["norm"],
            head=self._input_major(head),
            layers=tuple(self._layer(index, layer) for index, layer in enumerate(held)),
        )

    # ---- what to read

    def _outer_plan(self) -> _Plan:
        c = self.config
        plan = {
            "embedding": _Part((("model.embed_tokens.weight", c.vocab),), c.hidden),
            "norm": _Part((("model.norm.weight", c.hidden),)),
        }
        if not c.tie:
            plan["head"] = _Part((("lm_head.weight", c.vocab),), c.hidden)
        return plan

    def _layer_plan(self, index: int) -> _Plan:
        c, name = self.config, f"model.layers.{index}"
        plan = {
            "attn_norm": _Part(((f"{name}.input_layernorm.weight", c.hidden),)),
            "mlp_norm": _Part(((f"{name}.post_attention_layernorm.weight", c.hidden),)),
        }
        plan |= self._attention_plan(f"{name}.self_attn")
        if index not in c.moe_layers:
            return plan | self._mlp_plan(f"{name}.mlp", c.inter)
        plan["gate"] = _Part(((f"{name}.mlp.gate.weight", c.experts),), c.hidden)
        if c.topk_method == "noaux_tc":
            plan["gate_bias"] = _Part(((f"{name}.mlp.gate.e_score_correction_bias", c.experts),), kind=_Kind.FLOAT)
        if c.shared_experts and self.shared:
            plan |= self._mlp_plan(f"{name}.mlp.shared_experts", c.shared_experts * c.moe_inter)
        return plan

    def _attention_plan(self, name: str) -> _Plan:
        c = self.config
        queries = (f"{name}.q_a_proj", c.q_lora) if c.q_lora else (f"{name}.q_proj", c.heads * self.width)
        both = [(f"{name}.kv_a_proj_with_mqa", c.latent), queries]
        if self.queries_first:
            both.reverse()
        plan = {
            "a": _Part(tuple((f"{part}.weight", rows) for part, rows in both), c.hidden, _Kind.LINEAR),
            "kv_norm": _Part(((f"{name}.kv_a_layernorm.weight", c.kv_lora),)),
            "kv_b": _Part(((f"{name}.kv_b_proj.weight", c.heads * (c.nope + c.v_dim)),), c.kv_lora),
            "o": _Part(((f"{name}.o_proj.weight", c.hidden),), c.heads * c.v_dim, _Kind.LINEAR),
        }
        if c.q_lora:
            plan["q_norm"] = _Part(((f"{name}.q_a_layernorm.weight", c.q_lora),))
            plan["b"] = _Part(((f"{name}.q_b_proj.weight", c.heads * self.width),), c.q_lora, _Kind.LINEAR)
        if c.attention_bias:
            biased = [part for part in both if part[0] != f"{name}.q_proj"]
            plan["a_bias"] = _Part(tuple((f"{part}.bias", rows) for part, rows in biased))
            plan["o_bias"] = _Part(((f"{name}.o_proj.bias", c.hidden),))
        return plan

    def _mlp_plan(self, name: str, inter: int) -> _Plan:
        hidden, both = self.config.hidden, tuple((f"{name}.{part}_proj.weight", inter) for part in ("gate", "up"))
        down = ((f"{name}.down_proj.weight", hidden),)
        return {"gate_up": _Part(both, hidden, _Kind.LINEAR), "down": _Part(down, inter, _Kind.LINEAR)}

    # ---- reading

    def _read(self, plans: Sequence[_Plan], progress: Progress | None) -> Iterator[_Held]:
        """What each plan names, as the source has it: [out, in]."""
        # All at once keeps the readers busy. A CPU's layout is made by copying, so there it is one after another.
        step = len(plans) if self.gpu else 1
        done, total = 0, sum(map(self._nbytes, plans))
        for first in range(0, len(plans), step):
            group = plans[first : first + step]
            held: list[_Held] = [{key: self._empty(part) for key, part in plan.items()} for plan in group]
            size = sum(map(self._nbytes, group))
            reads = [
                read for plan, tensors in zip(group, held, strict=True) for key in plan
                for read in _reads(plan[key], tensors[key])
            ]  # fmt: skip
            self.source.fill(reads, progress and _share(progress, done, size, total))
            done += size
            yield from held

    def _empty(self, part: _Part) -> Tensor | Fp8Blocks:
        fp8 = self._in_blocks(part)
        for name, rows in part.names[:-1]:
            if fp8 and rows % GROUP:
                raise ConfigError(f"tensor {name} has {rows} rows: in fp8 they must be a multiple of {GROUP}")
        shape = (part.rows, part.columns) if part.columns else (part.rows,)
        return empty(shape, self._dtype(part), self.device, fp8=fp8)

    def _in_blocks(self, part: _Part) -> bool:
        return self.gpu and self.config.fp8 and part.kind is _Kind.LINEAR

    def _dtype(self, part: _Part) -> torch.dtype:
        return torch.bfloat16 if self.gpu and part.kind is not _Kind.FLOAT else torch.float32

    def _nbytes(self, plan: _Plan) -> int:
        """But for the scales."""
        size = 0
        for part in plan.values():
            size += part.rows * max(1, part.columns) * (1 if self._in_blocks(part) else self._dtype(part).itemsize)
        return size

    # ---- laying out

    def _layer(self, index: int, held: _Held) -> Layer:
        """Takes everything out of `held`, so that what has been copied is freed."""
        w_uk, w_uv = self._up_projections(held.pop("kv_b"))
        dense = "gate_up" in held
        return Layer(
            index=index,
            attn_norm=held.pop("attn_norm"),
            qkv=self._qkv(held),
            w_uk=w_uk,
            w_uv=w_uv,
            o=self._input_major(held.pop("o")),
            o_bias=held.pop("o_bias", None),
            mlp_norm=held.pop("mlp_norm"),
            mlp=Mlp(self._input_major(held.pop("gate_up")), self._input_major(held.pop("down"))) if dense else None,
            w_gate=self._input_major(held.pop("gate")) if "gate" in held else None,
            gate_bias=held.pop("gate_bias", None),
        )

    def _qkv(self, held: _Held) -> QkvWeights:
        c = self.config
        a, bias, b = held.pop("a"), held.pop("a_bias", None), held.pop("b", None)
        rows = len(a.data)
        if bias is not None and len(bias) < rows:  # queries without q_lora have none
            none = bias.new_zeros(rows - len(bias))
            bias = torch.cat((none, bias) if self.queries_first else (bias, none))
        if not c.rope_interleave:
            latent, queries = (rows - c.latent, 0) if self.queries_first else (0, c.latent)
            key = torch.tensor([latent + c.kv_lora])
            heads = torch.arange(c.heads) * self.width + c.nope + (0 if c.q_lora else queries)
            for weight, firsts in ((a, key), (bias, key), (b if c.q_lora else a, heads)):
                if weight is not None:
                    _pair_up(weight, firsts, c.rope)
        return QkvWeights(
            a=self._input_major(a),
            a_bias=bias,
            kv_norm=held.pop("kv_norm"),
            q_norm=held.pop("q_norm", None),
            b=None if b is None else self._input_major(b),
            queries_first=self.queries_first,
        )

    def _up_projections(self, kv_b: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        w_uk, w_uv = kv_b.view(c.heads, c.nope + c.v_dim, c.kv_lora).split([c.nope, c.v_dim], 1)
        w_uv = w_uv.transpose(1, 2)
        return (w_uk, w_uv) if self.gpu else (w_uk.contiguous(), w_uv.contiguous())

    def _input_major(self, weight: Any) -> Any:
        """[out, in] -> [in, out], on a CPU copied: there with few rows the product is twice as fast."""
        return transposed(weight) if self.gpu else weight.T.contiguous()


def _reads(part: _Part, out: Tensor | Fp8Blocks) -> Iterator[Read]:
    first = 0
    for name, rows in part.names:
        yield Read(name, rows_of(out, first, first + rows))
        first += rows


def _share(progress: Progress, before: int, size: int, total: int) -> Progress:
    """What a part of `size` of all bytes tells."""
    return lambda done, of: progress(before + size * done // of, total)


def _pair_up(weight: Tensor | Fp8Blocks, firsts: Tensor, rope: int) -> None:
    """From each of the rows `firsts` on: `rope` rotary rows whose pairs lie as (0, rope / 2), (1, rope / 2 + 1) ... to
    pairs (0, 1), (2, 3) ... In place; raises ConfigError if a row of blocks would come under another scale."""
    within = torch.arange(rope)
    to = firsts.unsqueeze(1) + within  # [len(firsts), rope]
    come = firsts.unsqueeze(1) + within.view(2, -1).T.flatten()
    if isinstance(weight, Fp8Blocks):
        if not torch.equal(to // GROUP, come // GROUP):
            raise ConfigError(
                "rope_interleave false is not supported where rotary rows span two blocks of an fp8 weight"
            )
        weight = weight.data.view(torch.uint8)
    weight[to] = weight[come]


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

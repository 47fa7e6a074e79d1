"""A layer's experts on a GPU, each read into its place in the stacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from common.model_config import ModelConfig
from common.source import Progress, Read, Source, columns_of, empty, expert_of, put, rows_of, transposed
from kernels.experts import slot_table
from kernels.quant import GROUP, Fp8Blocks
from services.expert_shard.experts import names


@dataclass(frozen=True)
class ExpertStack:
    """Transposed views of what lies contiguous as the source has it, [held, out, in]."""

    gate_up: Tensor | Fp8Blocks  # [held, hidden, 2 * moe_inter] bf16 or in blocks of 8 bits, gate first
    down: Tensor | Fp8Blocks  # [held, moe_inter, hidden]
    slots: Tensor  # int64 [experts + shared + 1], slot_table of the ids held


def load_stack(
    config: ModelConfig,
    source: Source,
    layer: int,
    experts: Sequence[int],
    device: torch.device | str,
    *,
    shared: bool,
    fp8: bool,
    progress: Progress | None = None,
) -> ExpertStack:
    """The routed experts of these ids in this order; with `shared`, the layer's shared experts before them, as experts
    of ids config.experts on: kernels fetch their weights before a token's choice is known. `fp8`: in blocks of 8 bits,
    quantised here if the source has them wider; else bf16.

    `progress` is told of bytes read. Raises ConfigError naming a tensor that is missing or has another shape.
    """
    hidden, inter = config.hidden, config.moe_inter
    if fp8 and inter % GROUP:
        raise ConfigError(f"experts in fp8 need a moe_intermediate_size that is a multiple of {GROUP}, not {inter}")
    extra = config.shared_experts if shared else 0
    held = len(experts) + extra
    gate_up = empty((held, 2 * inter, hidden), torch.bfloat16, device, fp8=fp8)
    down = empty((held, hidden, inter), torch.bfloat16, device, fp8=fp8)
    reads = []
    for slot, expert in enumerate(experts, extra):
        gate_name, up_name, down_name = names(layer, expert)
        both = expert_of(gate_up, slot)
        reads += [Read(gate_name, rows_of(both, 0, inter)), Read(up_name, rows_of(both, inter, 2 * inter))]
        reads.append(Read(down_name, expert_of(down, slot)))
    wide = _Shared(config, layer, extra, device, fp8) if extra else None
    source.fill(reads + (wide.reads if wide else []), progress)
    for i in range(extra):
        assert wide is not None
        wide.cut(i, expert_of(gate_up, i), expert_of(down, i))
    ids = [*range(config.experts, config.experts + extra), *experts]
    slots = slot_table({expert: slot for slot, expert in enumerate(ids)}, config.experts + extra)
    return ExpertStack(transposed(gate_up), transposed(down), slots.to(device))


def load_stacks(
    config: ModelConfig,
    source: Source,
    experts: Sequence[int],
    device: torch.device | str,
    *,
    shared: bool,
    fp8: bool,
    progress: Progress | None = None,
) -> dict[int, ExpertStack]:
    """`load_stack` of every MoE layer, by layer; `progress` is told of layers."""
    stacks: dict[int, ExpertStack] = {}
    for layer in config.moe_layers:
        stacks[layer] = load_stack(config, source, layer, experts, device, shared=shared, fp8=fp8)
        if progress is not None:
            progress(len(stacks), len(config.moe_layers))
    return stacks


class _Shared:
    """The shared experts as the source has them, one FFN of their joint width: expert i is its i-th part."""

    def __init__(self, config: ModelConfig, layer: int, count: int, device: torch.device | str, fp8: bool) -> None:
        self.inter, width = config.moe_inter, count * config.moe_inter
        self.gate, self.up = (empty((width, config.hidden), torch.bfloat16, device, fp8=fp8) for _ in range(2))
        self.down = empty((config.hidden, width), torch.bfloat16, device, fp8=fp8)
        name = f"model.layers.{layer}.mlp.shared_experts"
        self.reads = [
            Read(f"{name}.{part}_proj.weight", out)
            for part, out in (("gate", self.gate), ("up", self.up), ("down", self.down))
        ]

    def cut(self, i: int, gate_up: Tensor | Fp8Blocks, down: Tensor | Fp8Blocks) -> None:
        part = i * self.inter, (i + 1) * self.inter
        put(rows_of(self.gate, *part), rows_of(gate_up, 0, self.inter))
        put(rows_of(self.up, *part), rows_of(gate_up, self.inter, 2 * self.inter))
        put(columns_of(self.down, *part), down)

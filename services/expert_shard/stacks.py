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
    """Of every MoE layer: the routed experts of these ids in this order; with `shared`, the layer's shared experts
    before them, as experts of ids config.experts on: kernels fetch their weights before a token's choice is known.
    `fp8`: in blocks of 8 bits, quantised here if the source has them wider; else bf16.

    `progress` is told of bytes read. Raises ConfigError naming a tensor that is missing or has another shape.
    """
    if fp8 and config.moe_inter % GROUP:
        raise ConfigError(
            f"experts in fp8 need a moe_intermediate_size that is a multiple of {GROUP}, not {config.moe_inter}"
        )
    extra = config.shared_experts if shared else 0
    ids = [*range(config.experts, config.experts + extra), *experts]
    slots = slot_table({expert: slot for slot, expert in enumerate(ids)}, config.experts + extra).to(device)
    layers = [_Layer(config, layer, experts, extra, device, fp8) for layer in config.moe_layers]
    source.fill([read for layer in layers for read in layer.reads], progress)  # at once: it keeps the readers busy
    return {layer.index: layer.stack(slots) for layer in layers}


class _Layer:
    """What a layer's stack is read into."""

    def __init__(
        self, config: ModelConfig, index: int, experts: Sequence[int], extra: int, device: torch.device | str, fp8: bool
    ) -> None:
        hidden, inter, held = config.hidden, config.moe_inter, extra + len(experts)
        self.index, self._inter, self._extra = index, inter, extra
        self._gate_up = empty((held, 2 * inter, hidden), torch.bfloat16, device, fp8=fp8)
        self._down = empty((held, hidden, inter), torch.bfloat16, device, fp8=fp8)
        self.reads: list[Read] = []
        for slot, expert in enumerate(experts, extra):
            self.reads += map(Read, names(index, expert), self._slot(slot))
        # The source has the shared experts as one FFN of their joint width: expert i is its i-th part.
        self._joint: tuple[Tensor | Fp8Blocks, ...] = ()
        if extra:
            shapes = (extra * inter, hidden), (extra * inter, hidden), (hidden, extra * inter)
            joint = (empty(shape, torch.bfloat16, device, fp8=fp8) for shape in shapes)
            self._joint = self._slot(0) if extra == 1 else tuple(joint)
            name = f"model.layers.{index}.mlp.shared_experts"
            self.reads += map(Read, (f"{name}.{part}_proj.weight" for part in ("gate", "up", "down")), self._joint)

    def _slot(self, slot: int) -> tuple[Tensor | Fp8Blocks, ...]:
        """Its gate, up and down as the source has them."""
        both, inter = expert_of(self._gate_up, slot), self._inter
        return rows_of(both, 0, inter), rows_of(both, inter, 2 * inter), expert_of(self._down, slot)

    def stack(self, slots: Tensor) -> ExpertStack:
        """Once all is read. What was read of several shared experts is freed."""
        joint, self._joint, self.reads = self._joint, (), []
        if self._extra > 1:
            for i in range(self._extra):
                part, (gate, up, down) = (i * self._inter, (i + 1) * self._inter), self._slot(i)
                put(rows_of(joint[0], *part), gate)
                put(rows_of(joint[1], *part), up)
                put(columns_of(joint[2], *part), down)
        return ExpertStack(transposed(self._gate_up), transposed(self._down), slots)

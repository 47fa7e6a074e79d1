"""A layer's experts on a GPU, each read into its place in the stacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from common.model_config import ModelConfig
from common.source import Progress, Read, Source, empty, expert_of, rows_of, transposed
from kernels.experts import slot_table
from kernels.quant import GROUP, Fp8Blocks, scale_shape
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
    if fp8 and config.moe_layers and config.moe_inter % GROUP:
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
            both = expert_of(self._gate_up, slot)
            outs = rows_of(both, 0, inter), rows_of(both, inter, 2 * inter), expert_of(self._down, slot)
            self.reads += map(Read, names(index, expert), outs)
        if extra:
            both = _joint(self._gate_up, extra, 2 * extra * inter, hidden)
            down = _joint(self._down, extra, hidden, extra * inter)
            outs = rows_of(both, 0, extra * inter), rows_of(both, extra * inter, 2 * extra * inter), down
            name = f"model.layers.{index}.mlp.shared_experts"
            self.reads += map(Read, (f"{name}.{part}_proj.weight" for part in ("gate", "up", "down")), outs)

    def stack(self, slots: Tensor) -> ExpertStack:
        """Once all is read."""
        if self._extra > 1:
            for gate_up, down in zip(_tensors(self._gate_up), _tensors(self._down), strict=True):
                _take_apart(gate_up[: self._extra], 2)
                _take_apart(down[: self._extra], len(down[0]))
        return ExpertStack(transposed(self._gate_up), transposed(self._down), slots)


# The source has the shared experts as one FFN of their joint width, of which expert i is the i-th part. It is read to
# where they will lie, each matrix as the source has it, and then their rows are put in order.


def _joint(stack: Tensor | Fp8Blocks, experts: int, rows: int, columns: int) -> Tensor | Fp8Blocks:
    """The memory of the first experts of a stack as one matrix of as many numbers."""
    if isinstance(stack, Tensor):
        return stack[:experts].view(rows, columns)
    shape = rows, columns
    return Fp8Blocks(stack.data[:experts].view(shape), stack.scale[:experts].view(scale_shape(shape)))


def _tensors(weight: Tensor | Fp8Blocks) -> tuple[Tensor, ...]:
    return (weight,) if isinstance(weight, Tensor) else (weight.data, weight.scale)


def _take_apart(experts: Tensor, parts: int) -> None:
    """[experts, ...], of which the memory holds [parts, experts, ...]: each expert's parts one behind the other."""
    joint = experts.view(parts, len(experts), -1)
    experts.copy_(joint.transpose(0, 1).clone(memory_format=torch.contiguous_format).view(experts.shape))

"""The routed experts that a shard holds, and the partial sums they give."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.model_config import ModelConfig
from common.source import Progress, Source
from kernels.experts import experts, slot_table


@dataclass(frozen=True, slots=True)
class _Layer:
    """A value: a layer's experts and where they are change together."""

    experts: tuple[int, ...]  # in the order of the stacks
    slots: Tensor  # slot_table of the same order
    gate_up: Tensor  # [held, hidden, 2 * moe_inter] float32, gate first
    down: Tensor  # [held, moe_inter, hidden] float32


def names(layer: int, expert: int) -> tuple[str, str, str]:
    """Gate, up and down of one expert."""
    mlp = f"model.layers.{layer}.mlp.experts.{expert}"
    return f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight", f"{mlp}.down_proj.weight"


def require_experts(config: ModelConfig, source: Source) -> None:
    """Raises ConfigError naming a routed expert's tensor that the source lacks; reads no weights."""
    for layer in config.moe_layers:
        for expert in range(config.experts):
            for name in names(layer, expert):
                source.require(name)


class ExpertStore:
    """Loads and drops whole partitions while `compute` goes on in another thread."""

    def __init__(self, config: ModelConfig, source: Source) -> None:
        self._config, self._source = config, source
        self._layers: dict[int, _Layer] = {layer: self._empty() for layer in config.moe_layers}
        self._held: frozenset[int] = frozenset()
        self._changing = threading.Lock()
        self._asked = np.zeros(1 + config.experts, np.int64)  # -1, then each expert: how often `compute` was asked

    @property
    def held(self) -> frozenset[int]:
        return self._held

    @property
    def tokens(self) -> list[int]:
        """That each expert got since the start, over all layers."""
        return self._asked[1:].tolist()

    def compute(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> bool:
        """out [T, hidden] = sum over k of weights[:, k] * expert(ids[:, k])(x); ids that are not held give nothing.

        Whether everything that was asked for (an id of -1 asks for nothing) is held.
        """
        held = self._layers[layer]
        experts(x, ids, weights, held.gate_up, held.down, held.slots, out)
        asked = ids.numpy()
        absent = np.count_nonzero(held.slots.numpy().take(asked) == len(held.experts))
        counts = np.bincount(asked.ravel() + 1, minlength=len(self._asked))
        np.add(self._asked, counts, out=self._asked)
        return absent == counts[0]

    def check(self) -> None:
        require_experts(self._config, self._source)

    def load(self, partitions: Iterable[int], progress: Progress | None = None) -> None:
        """Read what is missing of these partitions, `progress` in bytes as they are held.

        Raises ConfigError naming a tensor that is missing or misshapen.
        """
        with self._changing:
            wanted = self._held | set(partitions)
            new = self._config.experts_of(wanted - self._held)
            size = 12 * self._config.hidden * self._config.moe_inter  # bytes of one expert of one layer
            total = len(new) * len(self._layers) * size
            done = 0
            for layer in self._layers:
                fresh = {}
                for expert in new:
                    fresh[expert] = self._read(layer, expert)
                    done += size
                    if progress is not None:
                        progress(done, total)
                self._replace(layer, fresh, self._config.experts_of(wanted))
            self._held = wanted

    def drop(self, partitions: Iterable[int]) -> None:
        with self._changing:
            kept = self._held - set(partitions)
            if kept == self._held:
                return
            self._held = kept  # what is announced first: a layer that is on its way out is promised to nobody
            for layer in self._layers:
                self._replace(layer, {}, self._config.experts_of(kept))

    def _empty(self) -> _Layer:
        hidden, inter = self._config.hidden, self._config.moe_inter
        slots = slot_table({}, self._config.experts)
        return _Layer((), slots, torch.empty(0, hidden, 2 * inter), torch.empty(0, inter, hidden))

    def _read(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden, inter = self._config.hidden, self._config.moe_inter
        gate, up, down = names(layer, expert)
        return (
            self._source.tensor(gate, (inter, hidden)),
            self._source.tensor(up, (inter, hidden)),
            self._source.tensor(down, (hidden, inter)),
        )

    def _replace(self, layer: int, fresh: dict[int, tuple[Tensor, Tensor, Tensor]], wanted: list[int]) -> None:
        """Hold exactly `wanted`, in this order, of old and fresh experts; the peak is one layer twice."""
        old, inter = self._layers[layer], self._config.moe_inter
        before = {expert: slot for slot, expert in enumerate(old.experts)}
        gate_up = torch.empty(len(wanted), *old.gate_up.shape[1:])
        down = torch.empty(len(wanted), *old.down.shape[1:])
        for slot, expert in enumerate(wanted):
            if expert in fresh:
                gate, up, out = fresh[expert]
                gate_up[slot, :, :inter], gate_up[slot, :, inter:], down[slot] = gate.T, up.T, out.T
            else:
                gate_up[slot], down[slot] = old.gate_up[before[expert]], old.down[before[expert]]
        slots = slot_table({expert: slot for slot, expert in enumerate(wanted)}, self._config.experts)
        self._layers[layer] = _Layer(tuple(wanted), slots, gate_up, down)

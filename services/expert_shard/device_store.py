"""The routed experts that a shard on a GPU holds, as stacks that its graphs name."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch

from common.model_config import ModelConfig
from common.source import Progress, Source
from services.expert_shard.experts import names
from services.expert_shard.stacks import ExpertStack, load_stack


class DeviceStore:
    """`stacks` is a value, by layer: captured graphs name its memory, so a change is another value.

    What is dropped is not promised to anybody any more, but stays in memory until something else is loaded.
    """

    def __init__(self, config: ModelConfig, source: Source, fp8: bool) -> None:
        self.fp8 = fp8
        self.stacks: Mapping[int, ExpertStack] = {}
        self._config, self._source = config, source
        self._loaded: frozenset[int] = frozenset()
        self._held: frozenset[int] = frozenset()
        self._changing = threading.Lock()

    @property
    def held(self) -> frozenset[int]:
        return self._held

    def check(self) -> None:
        """Raises ConfigError naming a routed expert's tensor that the source lacks; reads no weights."""
        for layer in self._config.moe_layers:
            for expert in range(self._config.experts):
                for name in names(layer, expert):
                    self._source.require(name)

    def load(self, partitions: Iterable[int], progress: Progress | None = None) -> None:
        """Hold these too. The stacks are whole, so that all that is held is read again, beside the old."""
        with self._changing:
            wanted = self._held | set(partitions)
            if not wanted <= self._loaded:
                if not self._held:
                    self.stacks, self._loaded = {}, frozenset()
                    torch.cuda.empty_cache()
                self.stacks, self._loaded = self._read(wanted, progress), wanted
            self._held = wanted

    def drop(self, partitions: Iterable[int]) -> None:
        with self._changing:
            self._held -= set(partitions)

    def _read(self, partitions: Iterable[int], progress: Progress | None) -> dict[int, ExpertStack]:
        config, stacks = self._config, {}
        experts = sorted(e for p in partitions for e in range(p, config.experts, config.partitions))
        for layer in config.moe_layers:
            stacks[layer] = load_stack(config, self._source, layer, experts, "cuda", shared=False, fp8=self.fp8)
            if progress is not None:
                progress(len(stacks), len(config.moe_layers))
        torch.cuda.synchronize()
        return stacks

"""The routed experts that a shard on a GPU holds, as stacks that its graphs name."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch

from common.model_config import ModelConfig
from common.source import Progress, Source
from services.expert_shard.experts import require_experts
from services.expert_shard.stacks import ExpertStack, load_stacks


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
        require_experts(self._config, self._source)

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
        config = self._config
        experts = config.experts_of(partitions)
        stacks = load_stacks(config, self._source, experts, "cuda", shared=False, fp8=self.fp8, progress=progress)
        torch.cuda.synchronize()
        return stacks

"""The one place where a worker and the experts of a shard are composed: the expert link is a function call inside the
worker's own CUDA graphs."""

from __future__ import annotations

import torch

from common.errors import ConfigError
from common.link import NoLinks
from common.source import Source
from services.expert_shard.stacks import load_stack
from services.gpu_worker.engine import Engine
from services.gpu_worker.gpu_actor import GpuWorker
from services.gpu_worker.model import Stack
from services.gpu_worker.weights import load_weights


class ColocatedWorker(GpuWorker):
    own_experts = True

    def _open_links(self) -> NoLinks:
        return NoLinks()

    def _make_engine(self) -> Engine:
        config = self.config
        if not torch.cuda.is_available() or self.settings.device == "cpu":
            raise ConfigError("services.colocated needs a GPU: without one start services.gpu_worker and expert shards")
        source = self._open_source()
        stacks = self._load_stacks(source)
        weights = load_weights(config, source, "cuda", shared=not config.moe_layers, progress=self._told("weights"))
        return self._engine(weights, stacks, None)

    def _load_stacks(self, source: Source) -> dict[int, Stack]:
        config, fp8 = self.config, self.config.fp8 or self.settings.experts_fp8
        stacks: dict[int, Stack] = {}
        for layer in config.moe_layers:
            stacks[layer] = load_stack(config, source, layer, range(config.experts), "cuda", shared=True, fp8=fp8)
            self._say("experts", len(stacks), len(config.moe_layers))
        return stacks

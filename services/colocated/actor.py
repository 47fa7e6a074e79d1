"""The one place where a worker and the experts of a shard are composed: the expert link is a function call inside the
worker's own CUDA graphs."""

from __future__ import annotations

import torch

from common.device import fitting, why_no_gpu
from common.errors import ConfigError
from common.link import NoLinks
from services.expert_shard.stacks import load_stacks
from services.gpu_worker.engine import Engine
from services.gpu_worker.gpu_actor import GpuWorker
from services.gpu_worker.weights import load_weights


class ColocatedWorker(GpuWorker):
    own_experts = True

    def _open_links(self) -> NoLinks:
        if self.settings.link != "auto":
            raise ConfigError(
                f"MOECULE_LINK is {self.settings.link}: services.colocated has its experts in its own process; leave "
                "it out, or start services.gpu_worker and expert shards"
            )
        return NoLinks()

    @fitting()
    def _make_engine(self) -> Engine:
        config = self.config
        if not torch.cuda.is_available() or self.settings.device == "cpu":
            raise ConfigError(
                "services.colocated needs a GPU; without one start services.gpu_worker and expert shards "
                f"(MOECULE_DEVICE=cpu make serve). {why_no_gpu()}"
            )
        source, fp8 = self._open_source(), config.fp8 or self.settings.experts_fp8
        stacks = load_stacks(
            config, source, range(config.experts), "cuda", shared=True, fp8=fp8, progress=self._told("experts")
        )
        weights = load_weights(config, source, "cuda", shared=not config.moe_layers, progress=self._told("weights"))
        return self._engine(weights, stacks, None)

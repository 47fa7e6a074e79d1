"""A worker on a GPU: the same actor, with the engine and the links of a GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from common.device import fitting
from common.errors import ConfigError
from common.link import NoLinks
from common.model_config import ModelConfig
from common.settings import Settings
from common.source import Source, open_source
from kernels.link import SlabLayout
from services.gpu_worker.actor import Worker
from services.gpu_worker.engine import Engine
from services.gpu_worker.gpu_engine import make_engine
from services.gpu_worker.gpu_links import GpuLinks
from services.gpu_worker.graphs import buckets
from services.gpu_worker.model import Stack
from services.gpu_worker.weights import Weights, load_weights


class GpuWorker(Worker):
    def _open_links(self) -> GpuLinks | NoLinks:
        settings = self.settings
        if settings.link == "bus":
            raise ConfigError("MOECULE_LINK is bus: a worker on a GPU reaches its shards by mailbox alone")
        if not self.config.moe_layers:
            return NoLinks()
        return GpuLinks(
            self.bus,
            self.config,
            worker_id=self.id,
            boot_id=self.boot_id,
            node=self.node,
            layout=link_layout(self.config, settings),
            buckets=buckets(settings.max_batch),
            loop=self._loop,
        )

    @fitting()
    def _make_engine(self) -> Engine:
        source = self._open_source()
        weights = load_weights(self.config, source, "cuda", progress=self._told("weights"))
        return self._engine(weights, None, self.links if isinstance(self.links, GpuLinks) else None)

    def _open_source(self) -> Source:
        self._started = time.monotonic()
        if self.settings.weights == "random":
            self.log.warning("weights are drawn at random: the text means nothing")
        return open_source(self.settings.model, self.config, self.settings.weights)

    def _engine(self, weights: Weights, stacks: Mapping[int, Stack] | None, links: GpuLinks | None) -> Engine:
        settings, config = self.settings, self.config
        torch.cuda.synchronize()
        self.preparing = "the worker is preparing its graphs"
        held = torch.cuda.memory_allocated() / 1e9
        device, seconds = torch.cuda.get_device_name(), round(time.monotonic() - self._started, 1)
        self.log.info("loaded", device=device, seconds=seconds, gb=round(held, 1))
        return make_engine(
            config,
            weights,
            stacks,
            self._from_engine,
            max_batch=settings.max_batch,
            max_context=config.context_within(settings.max_context),
            chunk_tokens=settings.chunk_tokens,
            prefix_cache=settings.prefix_cache,
            pages=settings.kv_pages,
            fp8_cache=settings.kv_cache == "fp8",
            memory=settings.gpu_memory,
            itl=settings.itl_ms / 1e3,
            links=links,
            log=self.log,
        )


def link_layout(config: ModelConfig, settings: Settings) -> SlabLayout:
    """What a worker and its shards set aside for each other. Raises ConfigError."""
    try:
        return SlabLayout(
            config.hidden,
            config.topk,
            settings.max_batch,
            settings.chunk_tokens,
            settings.link_shards,
            config.fp8 or settings.experts_fp8,
        )
    except ValueError as error:
        raise ConfigError(f"no link to shards on a GPU for this model: {error}") from error

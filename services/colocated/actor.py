"""The one place where a worker and the experts of a shard are composed: the expert link is a function call inside the
worker's own CUDA graphs."""

from __future__ import annotations

import time

import torch

from common.errors import ConfigError
from common.link import NoLinks
from common.source import Source, open_source
from services.expert_shard.stacks import ExpertStack, load_stack
from services.gpu_worker.actor import Worker
from services.gpu_worker.engine import Engine
from services.gpu_worker.gpu_engine import make_engine
from services.gpu_worker.weights import load_weights


class ColocatedWorker(Worker):
    own_experts = True

    def _open_links(self) -> NoLinks:
        return NoLinks()

    def _make_engine(self) -> Engine:
        settings, config = self.settings, self.config
        if not torch.cuda.is_available() or settings.device == "cpu":
            raise ConfigError("services.colocated needs a GPU: without one start services.gpu_worker and expert shards")
        started = time.monotonic()
        if settings.weights == "random":
            self.log.warning("weights are drawn at random: the text means nothing")
        source = open_source(settings.model, config, settings.weights)
        stacks = self._load_stacks(source)
        weights = load_weights(config, source, "cuda", shared=not config.moe_layers, progress=self._told("weights"))
        torch.cuda.synchronize()
        self.loading = "the worker is preparing its graphs"
        self.log.info("loaded", seconds=round(time.monotonic() - started, 1), gb=round(_held_gb(), 1))
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
            log=self.log,
        )

    def _load_stacks(self, source: Source) -> dict[int, ExpertStack]:
        config, fp8, stacks = self.config, self.config.fp8 or self.settings.experts_fp8, {}
        for layer in config.moe_layers:
            stacks[layer] = load_stack(config, source, layer, range(config.experts), "cuda", shared=True, fp8=fp8)
            self._say("experts", len(stacks), len(config.moe_layers))
        return stacks

    def _told(self, what: str):  # type: ignore[no-untyped-def]
        return lambda done, of: self._say(what, done, of)

    def _say(self, what: str, done: int, of: int) -> None:
        """Every tenth in the log, all of it in the heartbeat's reason."""
        before, self.loading = self.loading, f"the worker is loading the {what}: {100 * done // max(of, 1)} %"
        if self.loading != before and (10 * done // max(of, 1)) != (10 * (done - 1) // max(of, 1)):
            self.log.info("loading", what=what, percent=100 * done // max(of, 1))


def _held_gb() -> float:
    return torch.cuda.memory_allocated() / 1e9

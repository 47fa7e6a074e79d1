"""What the tests of the expert link share: a small checkpoint of experts, its answers, and shards and links over it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.actor import running
from common.bus import Bus
from common.link import ExpertLink
from common.messages import ExpertMap, LoadPartitions, ShardEntry, subject
from common.model_config import ModelConfig
from common.settings import Settings, node_id
from services.expert_shard.actor import ExpertShard
from services.gpu_worker.links import ExpertLinks

HIDDEN, INTER, EXPERTS, TOPK = 48, 24, 10, 3
LAYERS = (1, 2)
PATIENCE = 20.0  # seconds a test waits for what must come


def expert_name(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def write_experts(folder: Path, **changes: int) -> Path:
    """A V3 checkpoint folder with its routed experts and nothing else."""
    config = dict(
        architectures=["DeepseekV3ForCausalLM"], hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=2,
        vocab_size=64, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, intermediate_size=32,
        moe_intermediate_size=INTER, n_routed_experts=EXPERTS, n_shared_experts=1, num_experts_per_tok=TOPK,
        first_k_dense_replace=1, max_position_embeddings=128, eos_token_id=1,
    ) | changes  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    shapes = {"gate": (INTER, HIDDEN), "up": (INTER, HIDDEN), "down": (HIDDEN, INTER)}
    tensors = {
        expert_name(layer, expert, part): torch.randn(shape, generator=generator) * 0.2
        for layer in LAYERS
        for expert in range(EXPERTS)
        for part, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [count, HIDDEN], ids int64 [count, TOPK] (distinct in a row), weights [count, TOPK]"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(count, EXPERTS, generator=generator).topk(TOPK).indices
    return torch.randn(count, HIDDEN, generator=generator), ids, torch.rand(count, TOPK, generator=generator)


def reference(tensors: dict[str, Tensor], layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Token by token, expert by expert; an id of -1 adds nothing."""
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            if expert >= 0:
                gate, up, down = (tensors[expert_name(layer, expert, part)] for part in ("gate", "up", "down"))
                out[row] += weight * (down @ (torch.nn.functional.silu(gate @ x[row]) * (up @ x[row])))
    return out


def through(link: ExpertLink, layer: int, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One step of one layer, added to zeros."""
    out = torch.zeros_like(batch[0])
    link.begin_step()
    link.dispatch(layer, *batch)
    link.combine(out)
    return out


def whole_step(link: ExpertLink, batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    outs = [torch.zeros_like(batch[0]) for _ in LAYERS]
    link.begin_step()
    for layer, out in zip(LAYERS, outs, strict=True):
        link.dispatch(layer, *batch)
        link.combine(out)
    return outs


def map_of(config: ModelConfig, version: int, shards: dict[str, tuple[str, str]], owners: list[list[str]]) -> ExpertMap:
    """shards: id -> (boot id, node); owners: of each partition"""
    return ExpertMap(
        version=version,
        model=config.fingerprint,
        partitions=config.partitions,
        owners=tuple(tuple(sorted(of)) for of in owners),
        shards={shard: ShardEntry(*entry) for shard, entry in shards.items()},
    )


def dealt(config: ModelConfig, *shard_ids: str) -> list[list[str]]:
    """Partition p belongs to shard p modulo the number of shards."""
    return [[shard_ids[p % len(shard_ids)]] for p in range(config.partitions)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.002)


class Rig:
    """Shards and links over one checkpoint; the test plays the scheduler."""

    def __init__(self, folder: Path, make_bus: Callable[[], object], stack: contextlib.AsyncExitStack) -> None:
        self.folder, self.config = folder, ModelConfig.load(folder)
        self._make_bus, self._stack = make_bus, stack
        self.version = 0

    async def bus(self) -> Bus:
        return await self._make_bus()  # type: ignore[misc]

    async def shard(self, shard_id: str, partitions: list[int] | None = None) -> ExpertShard:
        """A running shard that holds these partitions, by default all."""
        settings = Settings(model=str(self.folder), device="cpu", drain_seconds=0.2)
        shard = ExpertShard(await self.bus(), settings, actor_id=shard_id)
        shard.life = await self._stack.enter_async_context(running(shard))  # type: ignore[attr-defined]
        await self.hold(shard, list(range(self.config.partitions)) if partitions is None else partitions)
        return shard

    async def hold(self, shard: ExpertShard, partitions: list[int]) -> None:
        self.version += 1
        message = LoadPartitions(version=self.version, partitions=tuple(partitions))
        await (await self.bus()).request(subject("shard", shard.id, "load"), message)
        await until(lambda: shard.store.held == frozenset(partitions))

    async def links(self, mode: str = "auto", worker: str = "w", **settings: object) -> ExpertLinks:
        made = ExpertLinks(
            await self.bus(), self.config, worker_id=worker, boot_id="b", node=node_id(), mode=mode,
            loop=asyncio.get_running_loop(), **{"decode_rows": 8, "prefill_rows": 40, **settings},
        )  # fmt: skip
        self._stack.push_async_callback(made.close)
        return made

    def map(self, shards: list[ExpertShard], owners: list[list[str]] | None = None) -> ExpertMap:
        """The next version, by default with the partitions dealt to the shards in turn."""
        self.version += 1
        owners = dealt(self.config, *(shard.id for shard in shards)) if owners is None else owners
        return map_of(self.config, self.version, {s.id: (s.boot_id, s.node) for s in shards}, owners)


@contextlib.asynccontextmanager
async def rig(folder: Path, make_bus: Callable[[], object]) -> AsyncIterator[Rig]:
    async with contextlib.AsyncExitStack() as stack:
        yield Rig(folder, make_bus, stack)

"""The expert link: how a worker's rows reach the routed experts and come back as partial sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from common.errors import Unavailable
from common.messages import ExpertMap

Compute = Callable[[int, Tensor, Tensor, Tensor, Tensor], object]
"""(layer, x [T, hidden] f32, ids [T, topk], weights [T, topk] f32, out [T, hidden] f32): fill `out` with the weighted
partial sums over the experts that the callee holds; -1 and experts it does not hold contribute nothing."""


class PeerLost(Unavailable):
    """A shard died, gave up or was given up in this step; the step can be run again from its start."""

    code = "peer_lost"

    def __init__(self, shard_id: str, why: str = "is gone") -> None:
        super().__init__(f"expert shard {shard_id} {why}")
        self.shard_id, self.why = shard_id, why


class ExpertLink(Protocol):
    """Used from one compute thread: begin_step, then dispatch and combine in turn for each MoE layer."""

    def begin_step(self) -> None:
        """Pick up the newest expert map, one version for the whole step; forget what a broken step left.

        Raises ExpertsUnavailable when some expert lives on no live shard.
        """
        ...

    def dispatch(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Send the rows on their way. The arguments must stay as they are until `combine` returns. Raises PeerLost."""
        ...

    def combine(self, out: Tensor) -> None:
        """Wait, and add the partial sums to `out` [T, hidden] float32, shards sorted by id. Raises PeerLost."""
        ...


class NoLinks:
    """In the place of a worker's links to shards where it needs none: its experts are in its own process."""

    reason = ""

    def __init__(self) -> None:
        self.version = 0  # of the newest expert map, which is acknowledged unread
        self.on_change: Callable[[], None] = lambda: None
        self.on_failure: Callable[[Exception], object] = lambda _: None

    @property
    def shards(self) -> tuple[str, ...]:
        return ()

    async def set_map(self, new_map: ExpertMap) -> None:
        self.version = new_map.version

    async def close(self) -> None:
        pass


class LocalLink:
    """Worker and experts in one process: a function call."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._sums = torch.empty(0)

    def begin_step(self) -> None:
        pass

    def dispatch(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        if self._sums.shape != x.shape:
            self._sums = torch.empty(x.shape, dtype=torch.float32)
        self._compute(layer, x, ids, weights, self._sums)

    def combine(self, out: Tensor) -> None:
        out += self._sums

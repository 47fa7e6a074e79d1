"""One worker's passes on a shard's GPU: a graph a bucket of decodes, and prefills launched as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from common.device import capturing
from kernels.ahead import compiling_ahead, prefill_sizes
from kernels.link import Peers, SlabLayout
from kernels.link.ipc import HostWords
from services.expert_shard.passes import SLICE_ROWS, Passes
from services.expert_shard.stacks import ExpertStack

REGIONS = 2  # of decodes, which layers take by turns: so many launch every kernel


class GpuLaunches:
    """Decodes run at a higher priority than prefills, so that of two workers' kernels a decode's get the processors
    that fall free. Passes of one worker stay in their order: each stream waits for the other's last pass.

    All is rehearsed on a step that counts as failed, in which nothing waits and nothing is sent: a kernel that is
    loaded while others spin may have to wait for them.
    """

    def __init__(
        self,
        layout: SlabLayout,
        peer: int,  # which of the worker's peers we are
        slab: Tensor,  # uint8, our formatted request slab
        there: int,  # address here of the worker's reply slab
        stacks: Mapping[int, ExpertStack],
        buckets: Sequence[int],
        bound: float,  # seconds that a wait may take
        free: Callable[[], None] = lambda: None,  # whatever memory is behind `slab` and `there`
        slice_rows: int = SLICE_ROWS,
        *,
        near: bool = False,  # the worker runs on our GPU
    ) -> None:
        self.layout, self._slab, self._buckets, self._slice, self._free = layout, slab, tuple(buckets), slice_rows, free
        self._abort = HostWords(1)
        self._end = Peers.empty(1, int(bound * 1e9), "cuda")
        block, flag = there + layout.block_at(peer), there + layout.flag_at(peer)
        self._end.attach(0, block, flag, slab.data_ptr() + layout.flag_at(), self._abort.address(0), near)
        self._decodes = torch.cuda.Stream(priority=-1)
        self._prefills = torch.cuda.Stream(priority=0)
        self._captures = torch.cuda.Stream()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.use(stacks)

    def use(self, stacks: Mapping[int, ExpertStack]) -> None:
        """Capture everything with these experts, while the passes captured before may still be launched."""
        dry = Peers.empty(1, 0, "cuda")
        dry.ok.zero_()
        self._rehearsal = Passes(self.layout, self._slab, dry, stacks, self._slice)
        passes = Passes(self.layout, self._slab, self._end, stacks, self._slice)
        with compiling_ahead(), torch.inference_mode():
            for rows in self._buckets:
                self._rehearsal.decode(rows, passes.new_work(rows), REGIONS)
            self.rehearse(prefill_sizes(self.layout.prefill_rows), layers=1)
        graphs = {rows: self._capture(passes, rows) for rows in sorted(self._buckets, reverse=True)}
        self.rehearse(prefill_sizes(self.layout.prefill_rows))
        self._passes, self._graphs = passes, graphs

    def rehearse(self, sizes: Sequence[int], layers: int | None = None) -> None:
        """Prefills of so many rows."""
        with torch.inference_mode(), torch.cuda.stream(self._captures):
            for rows in sizes:
                for piece in self._rehearsal.prefill(rows, layers):
                    piece()
        torch.cuda.synchronize()

    def _capture(self, passes: Passes, rows: int) -> torch.cuda.CUDAGraph:
        work, graph = passes.new_work(rows), torch.cuda.CUDAGraph()
        passes.works.append(work)
        with torch.cuda.stream(self._captures):
            self._rehearsal.decode(rows, work)  # compiles what is not compiled yet
        self._captures.synchronize()
        with capturing(graph, stream=self._captures, capture_error_mode="thread_local"):
            passes.decode(rows, work)
        return graph

    # ---- the launching thread's

    def decode(self, rows: int) -> None:
        graph = self._graphs[rows]
        self._decodes.wait_stream(self._prefills)
        with torch.cuda.stream(self._decodes):
            graph.replay()

    def prefill(self, rows: int) -> Iterator[Callable[[], None]]:
        self._prefills.wait_stream(self._decodes)
        for piece in self._passes.prefill(rows):
            yield lambda piece=piece: self._on_prefills(piece)  # type: ignore[misc]

    def _on_prefills(self, piece: Callable[[], None]) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._prefills):
            piece()

    def abort(self) -> None:
        self._abort[0] = 1

    def close(self) -> None:
        self._decodes.synchronize()
        self._prefills.synchronize()
        self._graphs = {}
        self._abort.close()
        self._free()

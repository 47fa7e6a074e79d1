"""A shard's part of all MoE layers of one pass of a worker: take the rows, compute, give the partial sums back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from kernels.combine_norm import SlotRows
from kernels.expert_plan import plan_experts
from kernels.experts import ExpertWork, grouped_ffn
from kernels.link import Peers, Region, SlabLayout, views
from kernels.quant import Fp8Blocks
from services.expert_shard.stacks import ExpertStack

SLICE_ROWS = 2048  # of a prefill that are computed in one go: other workers' decodes come between two slices
_WORKS = 4  # sizes of slices whose scratch is kept


class Passes:
    """Reads the rows where the worker wrote them; no count comes to the host.

    The shard's scratch is made for the worker's numbers of rows, so that its kernels have the tiles they would have in
    the worker's own process, and their sums the same bits.
    """

    def __init__(
        self,
        layout: SlabLayout,
        slab: Tensor,  # uint8, the formatted request slab
        end: Peers,  # attached to the worker
        stacks: Mapping[int, ExpertStack],  # by layer
        slice_rows: int = SLICE_ROWS,
    ) -> None:
        self.layout, self.end = layout, end
        self._stacks = tuple(stack for _, stack in sorted(stacks.items()))
        self._requests = {region: views.requests(slab, layout, region) for region in Region}
        self._slice = min(slice_rows, layout.prefill_rows)
        self._sums: Tensor | None = None
        self._works: dict[int, ExpertWork] = {}
        self.works: list[ExpertWork] = []  # of captured graphs, for as long as those live

    def new_work(self, rows: int) -> ExpertWork:
        """Scratch for a decode bucket, or a slice of prefill."""
        stack, layout = self._stacks[0], self.layout
        held, inter, _ = stack.down.data.shape
        fp8, device = isinstance(stack.down, Fp8Blocks), self.end.table.device
        work = ExpertWork.empty(rows, layout.topk, held, layout.hidden, inter, fp8, device, torch.bfloat16)
        # After a failed step a worker may write over ids that are being read. Whatever a plan is made of then, what it
        # does not fill must still name rows.
        work.plan.pairs.zero_()
        return work

    def decode(self, rows: int, work: ExpertWork, layers: int | None = None) -> None:
        """All layers, or the first ones, to be captured."""
        for order in range(len(self._stacks[:layers])):
            self.decode_layer(order, rows, work)

    def decode_layer(self, order: int, rows: int, work: ExpertWork) -> None:
        region = Region(order % 2)
        self._take(rows)
        self._give_back(self._partial(region, self._stacks[order], 0, rows, work), region)

    def prefill(self, rows: int, layers: int | None = None) -> Iterator[Callable[[], None]]:
        """All layers, or the first ones: a launch after the other, in pieces of at most a slice of one layer."""
        for stack in self._stacks[:layers]:
            yield lambda: self._take(rows)
            if rows <= self._slice:
                yield lambda stack=stack: self._give_back(  # type: ignore[misc]
                    self._partial(Region.PREFILL, stack, 0, rows, self._work_of(rows)), Region.PREFILL
                )
                continue
            for start in range(0, rows, self._slice):
                yield lambda stack=stack, start=start: self._slice_of(stack, start, rows)  # type: ignore[misc]
            yield lambda: self._give_back(self._all_sums()[:rows], Region.PREFILL)

    def _take(self, rows: int) -> None:
        from kernels.link.triton import take

        take(self.end, self.layout, rows)

    def _give_back(self, parts: Tensor | SlotRows, region: Region) -> None:
        from kernels.link.triton import give_back

        give_back(parts, self._requests[region].count, self.end, self.layout, region)

    def _partial(self, region: Region, stack: ExpertStack, start: int, end: int, work: ExpertWork) -> SlotRows:
        given = self._requests[region]
        plan_experts(given.ids[start:end], stack.slots, len(stack.down.data), work.plan)
        return grouped_ffn(given.x[start:end], given.weights[start:end], stack.gate_up, stack.down, work)

    def _slice_of(self, stack: ExpertStack, start: int, rows: int) -> None:
        end = min(start + self._slice, rows)
        part = self._partial(Region.PREFILL, stack, start, end, self._work_of(end - start))
        out = self._all_sums()[start:end]
        if out.is_cuda:
            from kernels.experts.triton import sum_slots

            sum_slots(part, out)
        else:
            out.copy_(part.sum())

    def _all_sums(self) -> Tensor:
        if self._sums is None:
            shape = self.layout.prefill_rows, self.layout.hidden
            self._sums = torch.empty(shape, dtype=torch.bfloat16, device=self.end.table.device)
        return self._sums

    def _work_of(self, rows: int) -> ExpertWork:
        """Chunks are mostly of one size."""
        if rows not in self._works:
            while len(self._works) >= _WORKS:
                del self._works[next(iter(self._works))]
            self._works[rows] = self.new_work(rows)
        return self._works[rows]

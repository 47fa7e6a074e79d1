"""The expert link's device ends on whatever device there is: on a CPU the kernels are interpreted, one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.experts import experts as all_experts
from kernels.experts import slot_table
from kernels.link import Peers, SlabLayout, views
from kernels.link.layout import ABORT_AT
from kernels.quant import Fp8Blocks
from services.expert_shard.passes import Passes
from services.expert_shard.stacks import ExpertStack
from services.gpu_worker.device_link import DeviceLink
from tests.kernel_checks import DEVICE, TOLERANCE, error_ratio

HIDDEN, INTER, EXPERTS, TOPK, LAYERS = 128, 64, 6, 2, (1, 2)
FOREVER = 3600.0


class Rig:
    """A worker, and shards that hold the experts with their number modulo how many there are."""

    def __init__(self, shards: int, slice_rows: int = 1 << 20) -> None:
        torch.manual_seed(3)
        self.layout = SlabLayout(HIDDEN, TOPK, 8, 12, shards, False)
        self.reply = torch.empty(self.layout.reply_bytes(), dtype=torch.uint8, device=DEVICE)
        views.format_slab(self.reply, 1)
        self.link = DeviceLink(self.layout, self.reply, LAYERS, EXPERTS, FOREVER)
        self.link.set_owner(np.arange(EXPERTS) % shards)
        self.whole = {layer: _stack(range(EXPERTS)) for layer in LAYERS}
        self.passes, self.ends, self.slabs = [], [], []
        for peer in range(shards):
            slab = torch.empty(self.layout.request_bytes(), dtype=torch.uint8, device=DEVICE)
            views.format_requests(slab, self.layout, 1)
            there, here = slab.data_ptr(), self.reply.data_ptr()
            end = Peers.empty(1, int(FOREVER * 1e9), DEVICE)
            end.attach(0, here + self.layout.block_at(peer), here + self.layout.flag_at(peer),
                       there + self.layout.flag_at(), there + ABORT_AT)  # fmt: skip
            self.link.attach(peer, there, there + ABORT_AT)
            mine = {layer: _part(stack, range(peer, EXPERTS, shards)) for layer, stack in self.whole.items()}
            self.passes.append(Passes(self.layout, slab, end, mine, slice_rows))
            self.ends.append(end)
            self.slabs.append(slab)

    def decode(self, batches: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """A layer after the other, the shards between dispatch and wait as they must be where nothing overlaps."""
        rows = len(batches[0][0])
        shards = [_layers(passes, rows) for passes in self.passes]
        return [self._layer(layer, batch, False, shards) for layer, batch in zip(LAYERS, batches, strict=True)]

    def prefill(self, batches: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        rows = len(batches[0][0])
        shards = []
        for passes in self.passes:
            pieces = list(passes.prefill(rows))
            each = len(pieces) // len(LAYERS)
            shards.append([pieces[i * each : (i + 1) * each] for i in range(len(LAYERS))])
        return [self._layer(layer, batch, True, shards) for layer, batch in zip(LAYERS, batches, strict=True)]

    def _layer(self, layer: int, batch: tuple[Tensor, Tensor, Tensor], prefill: bool, shards: list) -> Tensor:
        x, ids, weights = batch
        slots = self.link.new_slots(len(x))
        self.link.dispatch(layer, x, ids, weights, slots, prefill=prefill)
        for pieces in shards:
            for piece in pieces[LAYERS.index(layer)]:
                piece()
        return self.link.wait(slots).sum()

    def want(self, layer: int, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, ids, weights = batch
        stack, out = self.whole[layer], torch.empty(x.shape)
        all_experts(x.float(), ids.long(), weights, _wide(stack.gate_up), _wide(stack.down), stack.slots, out)
        return out


def _layers(passes: Passes, rows: int) -> list[list[Callable[[], None]]]:
    """A decode's launches, layer by layer."""
    work = passes.new_work(rows)
    return [[partial(passes.decode_layer, order, rows, work)] for order in range(len(LAYERS))]


def _wide(stack: Tensor | Fp8Blocks) -> Tensor:
    assert isinstance(stack, Tensor)
    return stack.float().contiguous()


def _stack(ids: range) -> ExpertStack:
    def weights(inputs: int, outputs: int) -> Tensor:
        return (torch.randn(len(ids), outputs, inputs, device=DEVICE) * inputs**-0.5).bfloat16().mT

    slots = slot_table({expert: slot for slot, expert in enumerate(ids)}, EXPERTS)
    return ExpertStack(weights(HIDDEN, 2 * INTER), weights(INTER, HIDDEN), slots.to(DEVICE))


def _part(whole: ExpertStack, ids: range) -> ExpertStack:
    slots = slot_table({expert: slot for slot, expert in enumerate(ids)}, EXPERTS)
    rows = torch.tensor(list(ids), device=DEVICE)
    assert isinstance(whole.gate_up, Tensor) and isinstance(whole.down, Tensor)
    parts = (w.mT[rows].contiguous().mT for w in (whole.gate_up, whole.down))
    return ExpertStack(*parts, slots.to(DEVICE))


def batch(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    ids = torch.rand(rows, EXPERTS, device=DEVICE).topk(TOPK, 1).indices.int()
    return torch.randn(rows, HIDDEN, device=DEVICE).bfloat16(), ids, torch.rand(rows, TOPK, device=DEVICE)


def check(rig: Rig, got: list[Tensor], batches: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for layer, out, given in zip(LAYERS, got, batches, strict=True):
        assert error_ratio(out.float(), rig.want(layer, given)) < TOLERANCE[torch.bfloat16]
    assert rig.link.peers.ok.item() == 1
    assert rig.link.behind() == []


@pytest.mark.parametrize("shards", [1, 3])
def test_sums_are_those_of_all_experts_in_one_place(shards: int) -> None:
    rig = Rig(shards)
    for step in range(2):
        rows = [batch(5, 10 * step + layer) for layer in LAYERS]
        check(rig, rig.decode(rows), rows)
        rows = [batch(11, 10 * step + layer) for layer in LAYERS]
        check(rig, rig.prefill(rows), rows)


@pytest.mark.parametrize("slice_rows", [4, 10])
def test_a_prefill_in_slices_gives_the_same_sums(slice_rows: int) -> None:
    rig = Rig(2, slice_rows)
    rows = [batch(11, layer) for layer in LAYERS]
    check(rig, rig.prefill(rows), rows)


def test_a_peer_that_does_not_answer_is_behind_and_its_step_is_not_ok() -> None:
    rig = Rig(2)
    rig.link.peers.budget.fill_(0)
    x, ids, weights = batch(5, 1)
    slots = rig.link.new_slots(5)
    rig.link.dispatch(1, x, ids, weights, slots, prefill=False)
    for piece in _layers(rig.passes[0], 5)[0]:
        piece()
    rig.link.wait(slots)
    assert rig.link.peers.ok.item() == 0
    assert rig.link.behind() == [1]
    rig.link.detach(1)
    rig.link.begin()
    assert rig.link.peers.ok.item() == 1
    assert rig.link.behind() == []

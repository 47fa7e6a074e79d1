"""The worker's end of the expert link in device memory: what the model's passes use, in graphs or not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.combine_norm import SlotRows
from kernels.link import Peers, Region, SlabLayout, views
from kernels.link.views import SENT, STEP
from kernels.quant import Fp8Rows

IN_FLIGHT = 2  # steps of which the host keeps what it tells the device and what it is told


class DeviceLink:
    """Dispatch and wait, by the kernels of kernels/link.

    What a host changes (`attach`, `detach`, `set_owner`, `begin`) it changes on the stream of the passes and between
    them: every pass before has read the old values by then and every later one reads the new, so that one table is
    enough where the design has two.
    """

    def __init__(
        self, layout: SlabLayout, reply: Tensor, moe_layers: Sequence[int], experts: int, bound: float
    ) -> None:
        """`reply`: the formatted slab, uint8; `bound`: seconds that a wait may take."""
        self.layout, self.reply = layout, reply
        self.peers = Peers.empty(layout.peers, int(bound * 1e9), reply.device)
        self.owner = torch.full((experts,), -1, dtype=torch.int32, device=reply.device)
        pinned = reply.is_cuda
        self._told = [torch.empty(experts, dtype=torch.int32, pin_memory=pinned) for _ in range(IN_FLIGHT)]
        self._turn = 0
        self._replies = views.replies(reply, layout)
        self._order = {layer: order for order, layer in enumerate(moe_layers)}

    # ---- in a pass

    def new_slots(self, rows: int) -> Tensor:
        return torch.full((rows, self.layout.peers), -1, dtype=torch.int32, device=self.reply.device)

    def dispatch(
        self, layer: int, x: Tensor | Fp8Rows, ids: Tensor, weights: Tensor, slots: Tensor, *, prefill: bool
    ) -> None:
        """`slots` [T, peers] int32, out: where the sums will lie."""
        from kernels.link.triton import dispatch

        region = Region.PREFILL if prefill else Region(self._order[layer] % 2)
        dispatch(x, ids, weights, self.owner, self.peers, self.layout, region, slots)

    def wait(self, slots: Tensor) -> SlotRows:
        """For the shards' answers to the last dispatch: one partial sum from each that was asked."""
        from kernels.link.triton import wait

        wait(self.peers, self.layout, len(slots))
        return SlotRows(self._replies, slots, awaited=True)

    # ---- between passes

    def begin(self) -> None:
        """A new start after a failed step, or the first."""
        self.peers.ok.fill_(1)

    def attach(self, peer: int, base: int, abort: int, near: bool = False) -> None:
        """`base`: the address here of the peer's request slab; `abort`: of the word that gives it up; `near`: it runs
        on this GPU."""
        inbox = self.reply.data_ptr() + self.layout.flag_at(peer)
        self.peers.attach(peer, base, base + self.layout.flag_at(), inbox, abort, near)

    def detach(self, peer: int) -> None:
        self.peers.detach(peer)

    def clear_flag(self, peer: int) -> None:
        """Before a new shard may set it."""
        views.flag_word(self.reply, self.layout, peer).zero_()
        if self.reply.is_cuda:
            torch.cuda.synchronize(self.reply.device)

    def set_owner(self, owner: np.ndarray) -> None:
        """int32 [experts]: the peer that is asked for each expert, -1: nobody."""
        self._turn = (self._turn + 1) % IN_FLIGHT
        told = self._told[self._turn]
        told.copy_(torch.from_numpy(np.ascontiguousarray(owner, dtype=np.int32)))
        self.owner.copy_(told, non_blocking=True)

    def behind(self) -> list[int]:
        """Peers that have not answered all dispatches. Waits for the passes under way."""
        table, found = self.peers.table.cpu(), []
        for peer in range(len(table)):
            if table[peer, 0]:
                answered = int(views.flag_word(self.reply, self.layout, peer))
                if _int32(answered - int(table[peer, SENT]) * STEP) < 0:
                    found.append(peer)
        return found


def _int32(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)

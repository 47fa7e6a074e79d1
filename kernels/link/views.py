"""A link's memory as tensors: the slabs, and the table through which kernels find it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.link.layout import ABORT_AT, BOOT_AT, GROUP, LAYOUT, VERSION_AT, Region, SlabLayout
from kernels.quant.naive import Fp8Rows

LIVE, BASE, FLAG, INBOX, ABORT, SENT, NEAR = range(7)
COLUMNS = 8  # of a row of the table of peers: 64 bytes
STEP = 4096  # what one whole signal adds to a flag, and the most programs that may share in one


@dataclass(frozen=True)
class Requests:
    """One region of a request slab, in place: what the expert kernels read."""

    x: Tensor | Fp8Rows  # [rows, hidden]
    ids: Tensor  # int32 [rows, topk], -1 past the count and where another shard's
    weights: Tensor  # float32 [rows, topk]
    count: Tensor  # int32 [1]


@dataclass(frozen=True)
class Peers:
    """One end of the links of an actor, in its device memory: a worker's to its shards, or a shard's to one worker.

    Row of the table: LIVE (1 or 0), BASE (address here of the peer's memory that we write: a shard's request slab, or
    our block of a worker's reply slab), FLAG (address of the flag that we set there), INBOX (address of the flag that
    the peer sets here), ABORT (address of an int32 that a host sets to give the peer up), SENT (how many signals we
    gave it), NEAR (1: it runs on our GPU). Kernels advance SENT; a host changes rows between steps only, on the stream
    that the steps run on.
    """

    table: Tensor  # int64 [peers, COLUMNS]
    ok: Tensor  # int32 [1], cleared when a wait fails; the host sets it to 1
    budget: Tensor  # int64 [1], nanoseconds that a wait may take
    tickets: Tensor  # int32 [peers], zeros between launches

    @staticmethod
    def empty(peers: int, budget_ns: int, device: torch.device | str) -> Peers:
        return Peers(
            torch.zeros(peers, COLUMNS, dtype=torch.int64, device=device),
            torch.ones(1, dtype=torch.int32, device=device),
            torch.full((1,), budget_ns, dtype=torch.int64, device=device),
            torch.zeros(peers, dtype=torch.int32, device=device),
        )

    def attach(self, peer: int, base: int, flag: int, inbox: int, abort: int, near: bool = False) -> None:
        """Both flags are zero: a link begins with fresh slabs. `near`: the peer runs on our GPU, maybe in another
        process, so that a signal need not wait until other devices would see the rows before it."""
        row = (1, base, flag, inbox, abort, 0, near, 0)
        self.table[peer] = torch.tensor(row, dtype=torch.int64, device=self.table.device)

    def detach(self, peer: int) -> None:
        self.table[peer].zero_()

    def __len__(self) -> int:
        return len(self.table)


def format_slab(slab: Tensor, boot_id: int) -> None:
    """Zeros everywhere but for the header."""
    slab.zero_()
    slab[VERSION_AT : VERSION_AT + 4].view(torch.int32)[0] = LAYOUT
    slab[BOOT_AT : BOOT_AT + 8].view(torch.int64)[0] = boot_id


def format_requests(slab: Tensor, layout: SlabLayout, boot_id: int) -> None:
    """A shard's slab for a worker. Even a wait that fails before the first use leaves ids that are none."""
    format_slab(slab, boot_id)
    for region in Region:
        requests(slab, layout, region).ids.fill_(-1)


def check_slab(slab: Tensor, boot_id: int) -> None:
    """Raises ValueError if it is not a slab of this layout, or one of another life of its owner."""
    version = int(slab[VERSION_AT : VERSION_AT + 4].view(torch.int32)[0])
    boot = int(slab[BOOT_AT : BOOT_AT + 8].view(torch.int64)[0])
    if (version, boot) != (LAYOUT, boot_id):
        raise ValueError(f"a slab of layout {version}, boot {boot:#x} was offered for {LAYOUT}, {boot_id:#x}")


def flag_word(slab: Tensor, layout: SlabLayout, peer: int = 0) -> Tensor:
    """int32 [1]"""
    return _cut(slab, layout.flag_at(peer), torch.int32, 1)


def abort_word(slab: Tensor) -> Tensor:
    """int32 [1]"""
    return _cut(slab, ABORT_AT, torch.int32, 1)


def requests(slab: Tensor, layout: SlabLayout, region: Region, fp8: torch.dtype = torch.float8_e4m3fn) -> Requests:
    at = layout.region(region)
    data = _cut(slab, at.data, fp8 if layout.quantised else torch.bfloat16, at.rows, layout.hidden)
    scales = layout.hidden // GROUP if layout.quantised else 0
    return Requests(
        Fp8Rows(data, _cut(slab, at.scale, torch.float32, at.rows, scales)) if layout.quantised else data,
        _cut(slab, at.ids, torch.int32, at.rows, layout.topk),
        _cut(slab, at.weights, torch.float32, at.rows, layout.topk),
        _cut(slab, at.count, torch.int32, 1),
    )


def replies(slab: Tensor, layout: SlabLayout) -> Tensor:
    """bf16 [peers * block_rows, hidden]: what the slots that `dispatch` writes index."""
    return _cut(slab, layout.replies_at, torch.bfloat16, layout.peers * layout.block_rows, layout.hidden)


def block(slab: Tensor, layout: SlabLayout, peer: int) -> Tensor:
    """bf16 [block_rows, hidden]: where shard `peer` writes."""
    return replies(slab, layout).unflatten(0, (layout.peers, -1))[peer]


def _cut(slab: Tensor, at: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """`slab` is uint8 [bytes]."""
    size = math.prod(shape) * dtype.itemsize
    return slab[at : at + size].view(dtype).view(shape)

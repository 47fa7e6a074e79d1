"""Where everything lies in the two slabs of a link between one worker and its expert shards.

All writes over a link are remote and all polls are local: the worker writes rows into the shard's memory and polls its
own, the shard writes partial sums into the worker's memory and polls its own. So

- a shard owns one REQUEST slab for each worker that is attached: rows, ids, weights, how many;
- a worker owns one REPLY slab for all its shards, a block of partial sums and a flag for each.

    0      u32 layout version   8      u64 boot id of the owner     64     i32 abort word, 0: go on
    128    i32 flags, a line of 128 bytes for each sender: one in a request slab, `peers` in a reply slab
    then   the regions (request) or the blocks of rows (reply)

A region is one use's worth of rows. There are three: two for decode, which consecutive layers use in turn, and one for
a chunk of prefill. Which one a layer uses is fixed when its graph is captured, because the expert kernels read the rows
in place, at fixed addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

LAYOUT = 1
ALIGN = 128  # bytes: a line of the L2, and more than any kernel's widest access
GROUP = 128  # columns of a row that share a scale, as kernels.quant has it
VERSION_AT, BOOT_AT, ABORT_AT, FLAGS_AT = 0, 8, 64, 128


class Region(IntEnum):
    EVEN, ODD, PREFILL = 0, 1, 2


@dataclass(frozen=True)
class RegionLayout:
    """Bytes from the start of the request slab, but for the last."""

    rows: int  # how many fit
    count: int  # int32 [1]
    ids: int  # int32 [rows, topk], -1 past the count and where another shard's
    weights: int  # float32 [rows, topk]
    data: int  # [rows, hidden] e4m3 or bf16
    scale: int  # float32 [rows, hidden / GROUP], nothing if not quantised
    end: int
    reply: int  # the region's first row in a block of the reply slab


@dataclass(frozen=True)
class SlabLayout:
    hidden: int  # a multiple of GROUP
    topk: int
    decode_rows: int
    prefill_rows: int
    peers: int  # shards that the worker's reply slab has room for
    quantised: bool

    def __post_init__(self) -> None:
        if self.hidden % GROUP or self.hidden <= 0:
            raise ValueError(f"a link's rows have a multiple of {GROUP} columns, not {self.hidden}")
        if min(self.topk, self.decode_rows, self.prefill_rows, self.peers) < 1:
            raise ValueError(f"a link has at least one of everything: {self}")

    def rows(self, region: Region) -> int:
        return self.prefill_rows if region is Region.PREFILL else self.decode_rows

    @property
    def block_rows(self) -> int:
        """Rows of one shard's block of the reply slab: all regions."""
        return 2 * self.decode_rows + self.prefill_rows

    @property
    def replies_at(self) -> int:
        """Where the blocks begin in the reply slab: bf16 [peers, block_rows, hidden]."""
        return FLAGS_AT + ALIGN * self.peers

    def block_at(self, peer: int) -> int:
        return self.replies_at + peer * self.block_rows * self.hidden * 2

    def flag_at(self, peer: int = 0) -> int:
        """The flag that shard `peer` sets in the reply slab; 0: the one that the worker sets in a request slab."""
        return FLAGS_AT + ALIGN * peer

    def region(self, region: Region) -> RegionLayout:
        start = FLAGS_AT + ALIGN if region is Region.EVEN else self.region(Region(region - 1)).end
        rows, width = self.rows(region), self.hidden if self.quantised else 2 * self.hidden
        scales = self.hidden // GROUP * 4 if self.quantised else 0
        sizes = (4, rows * self.topk * 4, rows * self.topk * 4, rows * width, rows * scales)
        at = [start]
        for size in sizes:
            at.append(aligned(at[-1] + size))
        count, ids, weights, data, scale, end = at
        return RegionLayout(rows, count, ids, weights, data, scale, end, int(region) * self.decode_rows)

    def request_bytes(self) -> int:
        """A shard's slab for this worker."""
        return self.region(Region.PREFILL).end

    def reply_bytes(self) -> int:
        """This worker's slab for all its shards."""
        return self.block_at(self.peers)

    def bytes(self) -> int:
        """All memory that a worker and its shards set aside for each other."""
        return self.peers * self.request_bytes() + self.reply_bytes()


def aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN

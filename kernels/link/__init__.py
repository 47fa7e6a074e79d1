"""The expert link on a GPU: rows to the shards and partial sums back, from kernel to kernel with no host in between.

    worker: dispatch -> (shared expert) -> wait -> combine, or combine_norm of the replies' SlotRows
    shard:  take -> experts on the region's rows in place -> give_back

Between processes (CUDA IPC) or within one; captured in graphs on both sides. On CPU the link is common/mailbox.
"""

from kernels.link.layout import Region, SlabLayout
from kernels.link.views import Peers, Requests

__all__ = ["Peers", "Region", "Requests", "SlabLayout"]

"""A worker on a GPU attaches to a shard on a GPU: what must fit, the memory of both, and the graphs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from common.device import device_uuid
from common.doorbell import Doorbell
from common.errors import Unavailable
from common.mailbox import HandshakeError, boot_word
from common.messages import Attach, GpuMailbox
from common.model_config import ModelConfig
from kernels.link import SlabLayout, views
from kernels.link.ipc import CudaError, DeviceMemory
from kernels.link.layout import LAYOUT
from services.expert_shard.gpu_server import GpuAttachment
from services.expert_shard.launches import GpuLaunches
from services.expert_shard.stacks import ExpertStack

WAIT_BOUND_SECONDS = 30.0
MOST_ROWS, MOST_PEERS, MOST_BUCKETS = 1 << 17, 256, 256  # of a worker; it asks for what its settings say


def mailbox_of(hello: Attach, node: str, fp8: bool) -> GpuMailbox:
    """Raises Unavailable where this worker can have no link to a shard on a GPU."""
    if hello.gpu is None:
        raise Unavailable("this shard computes on a GPU and the worker on a CPU, between which there is no link")
    if hello.node != node:
        raise Unavailable("this shard computes on a GPU of another node, to which there is no link yet")
    if hello.layout != LAYOUT:
        raise Unavailable(f"this shard's slabs have layout {LAYOUT}, the worker's {hello.layout}")
    if hello.gpu.quantised != fp8:
        kinds = {True: "8 bits", False: "bf16"}
        raise Unavailable(f"this shard's experts take rows in {kinds[fp8]}, the worker sends {kinds[not fp8]}")
    return hello.gpu


def layout_of(hello: Attach, mailbox: GpuMailbox, config: ModelConfig) -> SlabLayout:
    """Raises HandshakeError where the numbers make no sense."""
    rows = hello.decode_rows, hello.prefill_rows
    sane = (
        all(0 < count <= MOST_ROWS for count in rows)
        and 0 <= mailbox.peer < mailbox.peers <= MOST_PEERS
        and 0 < len(mailbox.buckets) <= MOST_BUCKETS
        and all(0 < bucket <= hello.decode_rows for bucket in mailbox.buckets)
    )
    if not sane:
        raise HandshakeError(f"a mailbox of {rows} rows, {mailbox.peers} shards and buckets {mailbox.buckets}")
    try:
        return SlabLayout(config.hidden, config.topk, *rows, mailbox.peers, mailbox.quantised)
    except ValueError as error:
        raise HandshakeError(str(error)) from error


def accept(
    hello: Attach,
    mailbox: GpuMailbox,
    doorbell: Doorbell,
    config: ModelConfig,
    stacks: Mapping[int, ExpertStack],
    boot_id: str,
    bound: float = WAIT_BOUND_SECONDS,
) -> tuple[GpuAttachment, bytes]:
    """The link, ready to serve, and the IPC handle of its request slab. Takes seconds. Raises HandshakeError."""
    if not stacks:
        raise HandshakeError("this shard holds no experts yet")
    layout, device = layout_of(hello, mailbox, config), torch.cuda.current_device()
    memory: list[DeviceMemory] = []

    def free() -> None:
        for part in reversed(memory):  # the worker's first
            part.close()

    try:
        memory.append(DeviceMemory.allocate(layout.request_bytes(), device))
        memory.append(DeviceMemory.open(mailbox.handle, layout.reply_bytes(), device))
        own, there = memory
        views.check_slab(there.tensor(), boot_word(hello.worker_boot_id))
        slab = own.tensor()
        views.format_requests(slab, layout, boot_word(boot_id))
        near = mailbox.device == device_uuid()
        launches = GpuLaunches(
            layout, mailbox.peer, slab, there.address, stacks, mailbox.buckets, bound, free, near=near
        )
    except (CudaError, ValueError, torch.OutOfMemoryError) as error:
        free()
        raise HandshakeError(f"no link between GPUs: {error}") from error
    return GpuAttachment(hello.worker_id, doorbell, launches, layout.prefill_rows), own.handle()

# mypy: disallow-incomplete-defs=False, check-untyped-defs=False
"""Signals between kernels of two processes, on one GPU or on two. Every function is @triton.jit.

A flag counts: one whole signal adds STEP to it. The programs of a kernel either share in the signal, each adding its
part after its own rows are written (no program waits for another), or take tickets, and the last one adds it all. A
waiter compares with what it expects by the sign of the difference, so flags may wrap.

The order of memory: rows are written by all threads of a program; the barrier puts them before the one thread that
signals; its release makes them visible before the flag. That is at system scope for a peer on another GPU; for one on
this GPU the GPU's scope is enough, whatever its process, and half a microsecond faster. A waiter acquires the flag at
system scope, which has both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda, hip

from kernels.link import views
from kernels.target import INTERPRETED

LIVE = tl.constexpr(views.LIVE)
BASE = tl.constexpr(views.BASE)
FLAG = tl.constexpr(views.FLAG)
INBOX = tl.constexpr(views.INBOX)
ABORT = tl.constexpr(views.ABORT)
SENT = tl.constexpr(views.SENT)
NEAR = tl.constexpr(views.NEAR)
COLUMNS = tl.constexpr(views.COLUMNS)
STEP = tl.constexpr(views.STEP)
_INTERPRETED = tl.constexpr(INTERPRETED)
_POLLS = tl.constexpr(32)  # of a flag between two looks at the clock and the abort word, which may be the host's memory


@triton.jit
def word_at(entry, COLUMN: tl.constexpr):
    """The int32 whose address the peer's table row holds."""
    return tl.load(entry + COLUMN).to(tl.pointer_type(tl.int32))


@triton.jit
def region_at(base, offset, dtype: tl.constexpr):
    """`offset` bytes (a multiple of ALIGN) into the memory at address `base`."""
    return tl.multiple_of((base + offset).to(tl.pointer_type(dtype)), 16)


@triton.jit
def signal(entry, flag, near, ticket, index, programs, TICKET: tl.constexpr):
    """The last thing of each of `programs` programs that write to this peer; `index` tells them apart. `near`: its
    NEAR, loaded before, since this is what the peer waits for."""
    tl.debug_barrier()  # every thread's rows are written before one of them signals
    if TICKET:
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(ticket, 0)
            tl.store(entry + SENT, tl.load(entry + SENT) + 1)
            _release(flag, STEP, near)
    else:
        share = tl.where(index == 0, STEP + 1 - programs, 1)
        _release(flag, share, near)
        if index == 0:
            tl.store(entry + SENT, tl.load(entry + SENT) + 1)


@triton.jit
def _release(flag, share, near):
    if near:
        tl.atomic_add(flag, share, sem="release", scope="gpu")
    else:
        tl.atomic_add(flag, share, sem="release", scope="sys")


@triton.jit
def heard(entry, lead, ok, budget, fine, ARCH: tl.constexpr):
    """Whether the peer has given `lead` more signals than we have: waits for it, while `fine`, until the host aborts,
    another wait of the step fails or the budget is used up."""
    inbox = word_at(entry, INBOX)
    target = ((tl.load(entry + SENT) + lead) * STEP).to(tl.int32)
    missing = _poll(inbox, ARCH) - target  # below 0: not yet
    if fine & (missing < 0):
        end = _now(ARCH) + tl.load(budget)
        abort, going = word_at(entry, ABORT), fine
        while going & (missing < 0):
            polls = 0
            while (missing < 0) & (polls < _POLLS):
                missing = _poll(inbox, ARCH) - target
                polls += 1
            given_up = (tl.load(abort, volatile=True) != 0) | (tl.load(ok, volatile=True) == 0)
            going = (_now(ARCH) < end) & (given_up == 0)
    return missing >= 0


@triton.jit
def all_heard(table, PEERS: tl.constexpr, LEAD: tl.constexpr, ok, budget, ARCH: tl.constexpr):
    """Waits for every live peer in turn; clears `ok` if one is not heard."""
    fine = tl.load(ok, volatile=True) != 0
    for peer in range(PEERS):
        entry = table + peer * COLUMNS
        if tl.load(entry + LIVE) != 0:
            fine = heard(entry, LEAD, ok, budget, fine, ARCH) & fine
    if fine == 0:
        tl.store(ok, 0)


@triton.jit
def _poll(flag, ARCH: tl.constexpr):
    if ARCH == "sm_90" and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [flag], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.atomic_add(flag, 0, sem="acquire", scope="sys")


@triton.jit
def _now(ARCH: tl.constexpr):
    """Nanoseconds."""
    if _INTERPRETED:
        return tl.full([], 0, tl.int64)
    elif ARCH == "sm_90":
        return cuda.globaltimer()
    else:
        return hip.memrealtime() * 10

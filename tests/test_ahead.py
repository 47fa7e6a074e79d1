"""Compiling ahead: nothing is launched, every kernel is compiled once, other threads go on."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.compiling import pretend


def _kernels_of_a_case() -> tuple[int, int, bool]:
    """(launches, distinct kernels compiled, whether the last one is found compiled), for sm_90 without a GPU."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    from kernels.ahead import compiling_ahead

    pretend("sm_90")
    from tests.kernel_cases import combine_norm

    run, launched = triton.JITFunction.run, []

    def counted(self, *args, grid, warmup, **options):  # type: ignore[no-untyped-def]
        assert warmup
        launched.append(run(self, *args, grid=grid, warmup=True, **options))
        return launched[-1]

    triton.JITFunction.run = counted
    with compiling_ahead():
        for _ in range(3):
            combine_norm.CASES[0].launch()
    assert triton.JITFunction.run is counted
    found = {id(future.result()) for future in launched}
    before = len(launched)
    with compiling_ahead():
        combine_norm.CASES[0].launch()
    return before, len(found), all("cubin" in kernel.asm for kernel in launched[before:])


def test_a_kernel_is_compiled_once_and_found_afterwards() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        launches, kernels, known = pool.submit(_kernels_of_a_case).result()
    assert launches == 3 * kernels
    assert known


@pytest.mark.gpu
def test_only_this_threads_launches_are_held_back() -> None:
    from kernels.ahead import compiling_ahead
    from kernels.embed import embed

    table = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    ids, source = (torch.full((4,), n, device="cuda", dtype=d) for n, d in ((3, torch.int64), (-1, torch.int32)))
    mine, theirs = (torch.zeros(4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with compiling_ahead():
        embed(ids, source, ids, table, mine)
        other = threading.Thread(target=embed, args=(ids, source, ids, table, theirs))
        other.start()
        other.join()
        torch.cuda.synchronize()
        assert not mine.any()
        assert torch.equal(theirs, table[ids])
    embed(ids, source, ids, table, mine)
    assert torch.equal(mine, table[ids])


@pytest.mark.gpu
def test_a_kernel_compiled_ahead_is_loaded_and_has_its_launcher() -> None:
    from kernels.ahead import compiling_ahead
    from kernels.embed import embed
    from kernels.embed.triton import _embed

    table = torch.randn(8, 192, device="cuda", dtype=torch.float16)  # a kernel of its own
    ids, source = (torch.zeros(4, device="cuda", dtype=d) for d in (torch.int64, torch.int32))
    before = set(map(id, _embed.device_caches[0][0].values()))
    with compiling_ahead():
        embed(ids, source, ids, table, torch.empty(4, 192, device="cuda", dtype=torch.float16))
    (kernel,) = (kernel for kernel in _embed.device_caches[0][0].values() if id(kernel) not in before)
    assert kernel.module is not None and kernel._run is not None

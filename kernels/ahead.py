"""Compiling what will be launched, on all processors, before anything runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton

# Rows of prefills of which each kind that the tiles of V2-Lite and R1 tell apart has one (tests/test_prefill_sizes.py),
# among them multiples of 16 and others.
_SIZES = (
    5000, 3000, 2048, 1000, 838, 768, 586, 512, 278, 256, 250, 160, 145, 128, 100, 64, 40, 33, 32, 25, 24, 18, 17, 16,
    10, 8, 3, 2,
)  # fmt: skip


def prefill_sizes(most: int) -> list[int]:
    """Which to rehearse, so that none of up to `most` rows compiles while it serves."""
    return [*(rows for rows in _SIZES if rows < most), most]


class _ReadyToLaunch(triton.AsyncCompileMode):
    """Loads each kernel too, and builds what launches it: Triton 3.6 compiles a C module for every signature at the
    first launch, one after another, a third of a second each."""

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> Any:
        def compile_and_load() -> Any:
            kernel = compile_fn()
            if torch.cuda.is_available():
                kernel.run  # noqa: B018 - a property that does it
            return kernel

        return super().submit(key, compile_and_load, finalize_fn)


@contextmanager
def compiling_ahead(ignore_errors: bool = False) -> Iterator[None]:
    """Triton's launches by this thread are not made within: their kernels are compiled, each once, and all are at the
    end. What else is called within runs, on memory that nothing was written to. Raises what a compilation raises."""
    run, caller = triton.JITFunction.run, threading.get_ident()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        dry = threading.get_ident() == caller  # other threads may be serving
        return run(self, *args, grid=grid, warmup=warmup or dry, **options)

    triton.JITFunction.run = compile_only
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, _ReadyToLaunch(pool, ignore_errors=ignore_errors):
            yield
    finally:
        triton.JITFunction.run = run

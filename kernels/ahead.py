"""Compiling what will be launched, on all processors, before anything runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton


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
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=ignore_errors):
            yield
    finally:
        triton.JITFunction.run = run

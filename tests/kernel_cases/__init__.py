"""The launches that tests/test_compile.py compiles for every target: one module an operation, each with CASES.

A case calls the Triton version itself, with `torch.empty` tensors on the CPU of the shapes to compile for; nothing
runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    name: str
    launch: Callable[[], None]
    hot: bool = False  # on the path of a decode step: may not spill registers on sm_90

"""Kernels against the memory's and the tensor cores' ceilings, and against peers, in one run on one GPU.

`python -m benchmarks.kernels` runs them; one module an operation lists its cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Launch = Callable[[], object]


@dataclass(frozen=True)
class KernelCase:
    """One operation at one shape.

    `make(tile)` builds fresh random inputs and returns the launches to time, one a set of inputs: the runner goes round
    them, so all sets together must be larger than the L2 (60 MB) wherever the serving engine would find it cold, as
    weights are. `tile` None is what the engine would use. `peers` are other implementations of the same, made the same
    way; one that cannot be imported raises ImportError when it is made.
    """

    op: str
    shape: str
    make: Callable[[dict | None], list[Launch]]
    bytes: float = 0.0  # that must cross the memory, each once
    flops: float = 0.0
    kind: str = "fp8"  # whose ceiling `flops` is held against: fp8 or bf16
    tiles: Callable[[], list[dict]] = list  # what the tuner sweeps
    tuned: tuple[str, str, int] | None = None  # (room, shape, bucket) of kernels/<room>/tiles.json for the best of them
    check: Callable[[], float] | None = None  # error RMS / reference RMS against naive, at this shape
    peers: Mapping[str, Callable[[], list[Launch]]] = field(default_factory=dict)
    goal: str = ""  # as issue or anchors state it, for the table

"""Where an actor computes. Imports torch, which a gateway and a scheduler never do."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common.errors import ConfigError
from common.settings import Settings


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """torch.cuda.graph without garbage collection: one in its middle may free tensors, which a capture forbids."""
    gc.disable()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        gc.enable()


def on_gpu(settings: Settings) -> bool:
    """Call it before anything else uses the GPU. Raises ConfigError if one is asked for that is not there."""
    if settings.device == "cpu":
        return False
    # Kernels of several streams wait for somebody: they must not share one of the GPU's few default queues.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise ConfigError("MOECULE_DEVICE is 'cuda', but torch finds no GPU here")
    return there

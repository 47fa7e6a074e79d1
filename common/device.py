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


@contextmanager
def fitting() -> Iterator[None]:
    """Whatever is loaded or prepared within fits into the GPU, or ends with a ConfigError that says what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        (free, total), held = torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
        raise ConfigError(
            f"the GPU's memory does not suffice: of its {total / 1e9:.1f} GB this process holds {held / 1e9:.1f}, and "
            f"{free / 1e9:.1f} are free (nvidia-smi shows who has the rest). A lower MOECULE_GPU_MEMORY, "
            "MOECULE_MAX_BATCH, MOECULE_CHUNK_TOKENS or MOECULE_KV_PAGES takes less, and MOECULE_EXPERTS_FP8=1 halves "
            "bf16 experts"
        ) from error


def require_gpu() -> None:
    """Waits for the device; raises if this process's GPU failed, where only a restart helps."""
    torch.cuda.synchronize()


def device_uuid() -> str:
    """The current GPU's, which is the same in every process on the node."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def why_no_gpu() -> str:
    """What PyTorch says where it finds none."""
    build = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        build = f"PyTorch {torch.__version__} is built for the CPU"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{build}: {str(error).splitlines()[0]}"
    return build


def on_gpu(settings: Settings) -> bool:
    """Call it before anything else uses the GPU. Raises ConfigError if one is asked for that is not there."""
    if settings.device == "cpu":
        return False
    # Kernels of several streams wait for somebody: they must not share one of the GPU's few default queues.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise ConfigError(f"MOECULE_DEVICE is 'cuda', but no GPU is found. {why_no_gpu()}")
    return there

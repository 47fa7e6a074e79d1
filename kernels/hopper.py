# mypy: ignore-errors
"""What the Gluon kernels for sm_90 share."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


@cache
def box_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """In shared memory, as products want it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _DTYPES[dtype])


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA's of a matrix, a box of `rows` by `columns` at a time."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns], box_layout(rows, columns, matrix.dtype))


@gluon.jit
def ring_barriers(STAGES: gl.constexpr, FILLERS: gl.constexpr, READERS: gl.constexpr):
    """(full, empty) of each stage of a ring, which so many fill and read. A fence has to follow."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=FILLERS)
        mbarrier.init(empty.index(stage), count=READERS)
    return full, empty

"""What the tests of Triton kernels share. Without a GPU they run under Triton's interpreter (conftest sets it), on
small shapes; with one, the same tests run there too, marked `gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from kernels.quant.naive import Fp8Blocks, Fp8Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2, torch.float8_e4m3fn: 3e-2}
"""dtype -> largest error RMS / reference RMS; float8 for whatever passes through it."""

either_device = pytest.mark.gpu if DEVICE == "cuda" else (lambda test: test)
"""Marks a test that runs interpreted in `make test` and compiled with `pytest -m gpu`."""

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_its_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
    """The interpreter's scalars are arrays of one element, which numpy 2.5 no longer takes for an integer: a loop over
    range(0, tl.load(...)) needs this."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_and_its_index


def error_ratio(got: Tensor, want: Tensor) -> float:
    """RMS of the error over RMS of the reference; 0 where both are all zero, and NaN never passes a `<`."""
    error = (got.double() - want.double()).square().mean().sqrt()
    scale = want.double().square().mean().sqrt()
    return 0.0 if not got.numel() or (error == 0) else float(error / scale)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output that shows where it was not written."""
    return poison(torch.empty(shape, dtype=dtype, device=DEVICE))


def poison(*tensors: Tensor | Fp8Rows | Fp8Blocks) -> Tensor:
    """Fill with NaN, or with a number no index is. Returns the first."""
    for tensor in tensors:
        for part in (tensor.data, tensor.scale) if not isinstance(tensor, Tensor) else (tensor,):
            if part.dtype == torch.float8_e4m3fn:
                part.view(torch.uint8).fill_(0x7F)
            else:
                part.fill_(torch.nan if part.is_floating_point() else torch.iinfo(part.dtype).min)
    return tensors[0]  # type: ignore[return-value]


def same(got: Tensor, want: Tensor) -> bool:
    """Bitwise."""
    return torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


def same_codes(got: Fp8Rows, want: Fp8Rows) -> bool:
    return same(got.data, want.data) and same(got.scale, want.scale)


def same_from_graph(
    launch: Callable[[], object], refill: Callable[[int], object], outputs: Iterable[Tensor], runs: int = 1000
) -> None:
    """A captured graph of `launch`, replayed on inputs that `refill(i)` writes in place: bitwise what eager gives."""
    outputs = tuple(outputs)
    refill(0)
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for i in range(runs):
        refill(i)
        poison(*outputs)
        launch()
        want = [output.clone() for output in outputs]
        refill(i)
        poison(*outputs)
        graph.replay()
        for output, eager in zip(outputs, want, strict=True):
            assert same(output, eager), f"run {i}"

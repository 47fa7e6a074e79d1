from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.linear import LinearScratch, naive, triton
from kernels.linear.tiles import LIBRARY, ring_tiles
from kernels.quant.naive import Fp8Blocks, Fp8Rows, dequantise, quantise_blocks, quantise_rows
from kernels.target import current
from tests.kernel_checks import DEVICE, TOLERANCE, either_device, error_ratio, poison, poisoned, same_from_graph

E4M3 = torch.float8_e4m3fn
R1 = [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168)]
V2_LITE = [(3072, 2048), (576, 2048), (2048, 2048), (10944, 2048)]


def activations(tokens: int, k: int, dtype: torch.dtype) -> Tensor | Fp8Rows:
    x = torch.randn(tokens, k, device=DEVICE)
    if dtype != E4M3:
        return x.to(dtype)
    rows = Fp8Rows.empty(tokens, k, DEVICE)
    quantise_rows(x, rows)
    return rows


def weights(k: int, n: int, dtype: torch.dtype) -> Tensor | Fp8Blocks:
    w = torch.randn(n, k, device=DEVICE).T / k**0.5
    return quantise_blocks(w) if dtype == E4M3 else w.to(dtype)


# The reference multiplies the same 8-bit operands, so their own rounding is not in it; but Hopper's tensor cores align
# the products of a step to 14 bits before they are summed.
PRODUCT = TOLERANCE | {E4M3: TOLERANCE[torch.float32] if DEVICE == "cpu" else 1e-3}


def wide(operand: Tensor | Fp8Rows | Fp8Blocks) -> Tensor:
    return operand.float() if isinstance(operand, Tensor) else dequantise(operand)


def scratch() -> LinearScratch:
    made = LinearScratch.empty(DEVICE)
    poison(made.partials)
    return made


def check(
    tokens: int, k: int, n: int, dtype: torch.dtype, out_dtype: torch.dtype, residual: str, tile: dict | None = None,
    split: bool = True,
) -> None:  # fmt: skip
    x, w, out = activations(tokens, k, dtype), weights(k, n, dtype), poisoned(tokens, n, dtype=out_dtype)
    add = None if residual == "none" else torch.randn(tokens, n, device=DEVICE).to(out_dtype)
    want = torch.empty(tokens, n, device=DEVICE)
    naive.linear(wide(x), wide(w), want, add=None if add is None else add.float())
    if residual == "in place":
        assert add is not None
        out.copy_(add)
        add = out
    lent = scratch() if split else None
    triton.linear(x, w, out, add=add, scratch=lent, tile=tile)
    assert error_ratio(out, want) < max(PRODUCT[dtype], TOLERANCE[out_dtype])
    assert lent is None or not lent.tickets.any()


@either_device
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(0, 70),
    k=st.integers(1, 4).map(lambda groups: 128 * groups),
    n=st.integers(1, 10).map(lambda halves: 64 * halves) | st.sampled_from([72, 200]),
    dtypes=st.sampled_from(
        [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
         (E4M3, torch.float32), (E4M3, torch.bfloat16), (E4M3, torch.float16)]
    ),
    residual=st.sampled_from(["none", "given", "in place"]),
    split=st.booleans(),
    seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_equals_naive(
    tokens: int, k: int, n: int, dtypes: tuple[torch.dtype, torch.dtype], residual: str, split: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    check(tokens, k, n, *dtypes, residual, split=split)


@either_device
@settings(deadline=None, max_examples=10)
@given(
    tokens=st.integers(1, 70),
    groups=st.integers(1, 6),
    n=st.integers(1, 5).map(lambda halves: 64 * halves),
    bm=st.sampled_from([16, 32, 64]),
    bn=st.sampled_from([64, 128]),
    splits=st.integers(1, 7),
    dtype=st.sampled_from([E4M3, torch.float16]),
    seed=st.integers(0, 1 << 30),
)
def test_any_tile_that_streams(
    tokens: int, groups: int, n: int, bm: int, bn: int, splits: int, dtype: torch.dtype, seed: int
) -> None:
    """Also with more splits than K has blocks, and more tiles of tokens than one."""
    torch.manual_seed(seed)
    tile = {"BM": bm, "BN": bn, "BK": 128, "splits": splits, "stages": 2, "warps": 4}
    check(tokens, 128 * groups, n, dtype, torch.float16, "given", tile)


def test_rows_may_lie_apart() -> None:
    x, w = activations(5, 256, E4M3), weights(128, 192, E4M3)
    assert isinstance(x, Fp8Rows)
    half = Fp8Rows(x.data[:, 128:], x.scale[:, 1:])
    outer, add = poisoned(5, 400, dtype=torch.float32), torch.randn(5, 192, device=DEVICE)
    want = torch.empty(5, 192, device=DEVICE)
    naive.linear(half, w, want, add=add)
    triton.linear(half, w, outer[:, 100:292], add=add, scratch=scratch())
    assert error_ratio(outer[:, 100:292], want) < TOLERANCE[torch.float32]
    assert outer[:, :100].isnan().all() and outer[:, 292:].isnan().all()


def test_operands_of_two_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="both operands in 8 bits or neither"):
        triton.linear(torch.zeros(1, 128), weights(128, 128, E4M3), torch.zeros(1, 128))


@pytest.mark.parametrize(("k", "n", "rows"), [(256, 128, 1), (128, 64, 1), (128, 128, 2)])
def test_shapes_that_do_not_match_are_refused(k: int, n: int, rows: int) -> None:
    with pytest.raises(ValueError, match="does not give"):
        triton.linear(torch.zeros(1, 128), torch.zeros(k, n), torch.zeros(rows, 128))


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), R1, ids=lambda size: str(size))
@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 200, 1024, 4096])
def test_equals_naive_at_full_size(tokens: int, n: int, k: int) -> None:
    check(tokens, k, n, E4M3, torch.bfloat16, "in place")
    check(tokens, k, n, E4M3, torch.bfloat16, "none")


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), V2_LITE, ids=lambda size: str(size))
@pytest.mark.parametrize("tokens", [1, 16, 64, 1024])
def test_bf16_equals_naive_at_full_size(tokens: int, n: int, k: int) -> None:
    check(tokens, k, n, torch.bfloat16, torch.bfloat16, "in place")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("bm", "width", "splits", "ring", "deep", "resident"),
    [(8, 1, 4, 2, 2, 2), (16, 4, 1, 3, 2, 1), (16, 2, 3, 2, 1, 2), (32, 3, 2, 2, 2, 1), (64, 1, 11, 2, 2, 1),
     (64, 3, 2, 3, 1, 1), (64, 2, 3, 2, 2, 1), (128, 1, 2, 3, 2, 1)],
)  # fmt: skip
def test_rings(dtype: torch.dtype, bm: int, width: int, splits: int, ring: int, deep: int, resident: int) -> None:
    """Filled once and often, an odd number of blocks, warpgroups past the last column, more splits than steps."""
    tile = {"ring": ring, "BM": bm, "width": width, "splits": splits, "deep": deep, "resident": resident}
    for n, k in [(72, 128), (200, 1152), (2112, 1280)]:
        check(bm - 3, k, n, dtype, torch.bfloat16, "in place", tile)


@pytest.mark.gpu
@pytest.mark.parametrize(("n0", "n1"), [(128, 128), (128, 64), (128, 0), (64, 0)])
@pytest.mark.parametrize("tokens", [1, 127, 300, 2112])
@pytest.mark.parametrize("n", [64, 256, 320, 2112])
def test_every_width_for_many_tokens(n0: int, n1: int, tokens: int, n: int) -> None:
    """Tiles whose parts start in the middle of a block of scales, hang over the last column, or lie past it."""
    tile = {"N0": n0, "N1": n1, "stages": 4, "deep": 8}
    check(tokens, 640, n, E4M3, torch.bfloat16, "in place", tile)
    check(tokens, 128, n, E4M3, torch.float16, "none", tile)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 1000, 4096])
def test_the_librarys_block_scales(tokens: int) -> None:
    check(tokens, 7168, 2112, E4M3, torch.bfloat16, "none", LIBRARY)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [130, 250, 251, 1001, 4095])
def test_any_number_of_tokens_where_the_library_was_measured_best(tokens: int) -> None:
    check(tokens, 1536, 24576, E4M3, torch.bfloat16, "none", None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "n", "k", "dtype"),
    [(1, 2112, 7168, E4M3), (64, 2112, 7168, E4M3), (64, 24576, 1536, E4M3), (4096, 2112, 7168, E4M3),
     (16, 576, 2048, torch.bfloat16)],
)  # fmt: skip
def test_the_same_from_a_graph(tokens: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w, lent = activations(tokens, k, dtype), weights(k, n, dtype), scratch()
    out, residual = poisoned(tokens, n, dtype=torch.bfloat16), torch.zeros(tokens, n, device=DEVICE).bfloat16()

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        fresh = activations(tokens, k, dtype)
        if isinstance(x, Fp8Rows) and isinstance(fresh, Fp8Rows):
            x.data.copy_(fresh.data)
            x.scale.copy_(fresh.scale)
        elif isinstance(x, Tensor) and isinstance(fresh, Tensor):
            x.copy_(fresh)
        residual.normal_()

    same_from_graph(lambda: triton.linear(x, w, out, add=residual, scratch=lent), refill, [out])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 64])
def test_neighbours_do_not_change_a_row(tokens: int) -> None:
    """One launch ahead of another, with what it fetches early, and another's scratch: 200 launches on end. Each takes
    for a residual what the one before it wrote."""
    x, w, lent = activations(tokens, 7168, E4M3), weights(7168, 2112, E4M3), scratch()
    for tile in [None, *ring_tiles(tokens, 2112, 7168, 1, current())[:4]]:
        outs = [torch.zeros(tokens, 2112, device=DEVICE).bfloat16() for _ in range(201)]
        for before, out in pairwise(outs):
            triton.linear(x, w, out, scratch=lent, tile=tile)
            triton.linear(x, w, before, add=out, scratch=lent, tile=tile)
        assert all(torch.equal(outs[0], out) for out in outs[:-1])

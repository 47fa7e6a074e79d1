from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.combine_norm import naive, triton
from kernels.combine_norm.naive import SlotRows
from kernels.quant.naive import Fp8Rows, dequantise
from kernels.quant.naive import quantise_rows as naive_rows
from kernels.quant.triton import quantise_rows
from tests.kernel_checks import DEVICE, TOLERANCE, either_device, error_ratio, poison, same_codes, same_from_graph

Parts = tuple[Tensor | SlotRows, ...]


def wide(parts: Parts) -> Parts:
    """The same in float32, for the naive version."""
    return tuple(SlotRows(p.rows.float(), p.slots) if isinstance(p, SlotRows) else p.float() for p in parts)


def inputs(tokens: int, hidden: int, dense: int, topk: int, dtype: torch.dtype) -> tuple[Tensor, Parts, Tensor]:
    def rows(count: int) -> Tensor:
        return torch.randn(count, hidden, device=DEVICE).to(dtype)

    parts: list[Tensor | SlotRows] = [rows(tokens) for _ in range(dense)]
    if topk:
        slots = torch.randperm(tokens * topk, device=DEVICE).view(tokens, topk).int()
        slots[torch.rand(tokens, topk, device=DEVICE) < 0.2] = -1
        parts.append(SlotRows(rows(tokens * topk), slots))
    return rows(tokens), tuple(parts), torch.rand(hidden, device=DEVICE).to(dtype)


KINDS = ["wide", "in 8 bits", "both"]


def check(tokens: int, hidden: int, dense: int, topk: int, dtype: torch.dtype, kind: str) -> None:
    residual, parts, weight = inputs(tokens, hidden, dense, topk, dtype)
    quantised = kind == "in 8 bits"
    out = Fp8Rows.empty(tokens, hidden, DEVICE) if quantised else torch.empty_like(residual)
    coded = Fp8Rows.empty(tokens, hidden, DEVICE) if kind == "both" else None
    poison(*(rows for rows in (out, coded) if rows is not None))
    # Of a few values the rounding to fp8 alone may come to 3 %: the naive version rounds, too.
    want = Fp8Rows.empty(tokens, hidden, DEVICE) if quantised else torch.empty(tokens, hidden, device=DEVICE)
    want_residual = residual.float().clone()
    naive.combine_norm(want_residual, wide(parts), weight.float(), 1e-3, want)
    triton.combine_norm(residual, parts, weight, 1e-3, out, coded)
    assert error_ratio(residual, want_residual) < TOLERANCE[dtype]
    if isinstance(out, Fp8Rows):
        assert error_ratio(dequantise(out), dequantise(want)) < TOLERANCE[torch.float8_e4m3fn]
    else:
        assert error_ratio(out, want) < TOLERANCE[dtype]
    if coded is not None and isinstance(out, Tensor):
        alone = Fp8Rows.empty(tokens, hidden, DEVICE)
        quantise_rows(out, alone)
        assert same_codes(coded, alone)


def test_naive_codes_what_it_normed() -> None:
    residual, parts, weight = inputs(3, 256, 1, 0, torch.float32)
    out, coded, alone = torch.empty_like(residual), Fp8Rows.empty(3, 256, DEVICE), Fp8Rows.empty(3, 256, DEVICE)
    poison(coded)
    naive.combine_norm(residual, parts, weight, 1e-3, out, coded)
    naive_rows(out, alone)
    assert same_codes(coded, alone)
    with pytest.raises(ValueError, match="8 bits alone"):
        triton.combine_norm(residual, parts, weight, 1e-3, alone, coded)


@either_device
@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(0, 9),
    hidden=st.integers(1, 6).map(lambda n: 128 * n),
    dense=st.integers(0, 2),
    topk=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1 << 30),
)
def test_equals_naive(
    tokens: int, hidden: int, dense: int, topk: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    check(tokens, hidden, dense, topk, dtype, kind)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("hidden", "topk", "kind"),
    [(7168, 8, "in 8 bits"), (7168, 0, "both"), (2048, 6, "wide")],
    ids=["R1", "R1, before the experts", "V2-Lite"],
)
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_equals_naive_at_full_size(tokens: int, hidden: int, topk: int, kind: str) -> None:
    check(tokens, hidden, 1, topk, torch.bfloat16, kind)


@pytest.mark.gpu
def test_the_same_from_a_graph() -> None:
    residual, parts, weight = inputs(16, 7168, 1, 8, torch.bfloat16)
    out = Fp8Rows.empty(16, 7168, DEVICE)

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        residual.normal_()
        parts[0].normal_()  # type: ignore[union-attr]

    same_from_graph(lambda: triton.combine_norm(residual, parts, weight, 1e-3, out), refill, (out.data, out.scale))

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.quant import Fp8Blocks, naive, quantise_blocks, triton
from kernels.quant.naive import Fp8Rows, dequantise
from tests.kernel_checks import DEVICE, TOLERANCE, either_device, error_ratio, poison, same_from_graph

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(tokens: int, width: int, dtype: torch.dtype, apart: bool = False) -> None:
    x = torch.randn(tokens, 2 * width if apart else width, device=DEVICE).to(dtype)[:, -width:]
    x *= torch.logspace(-6, 4, tokens, device=DEVICE).unsqueeze(1).to(dtype)  # scales of every size
    out, want = Fp8Rows.empty(tokens, width, DEVICE), Fp8Rows.empty(tokens, width, DEVICE)
    poison(out)
    naive.quantise_rows(x, want)
    triton.quantise_rows(x, out)
    assert error_ratio(out.scale, want.scale) < TOLERANCE[torch.float32]
    # Division and rounding are exact operations: a last bit of the scale apart, the codes are naive's.
    assert (out.data.float() != want.data.float()).float().mean() < 1e-3 or not tokens
    assert error_ratio(dequantise(out), dequantise(want)) < TOLERANCE[torch.float8_e4m3fn]


@either_device
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 12).map(lambda groups: 128 * groups),
    dtype=st.sampled_from(DTYPES),
    apart=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_equals_naive(tokens: int, width: int, dtype: torch.dtype, apart: bool, seed: int) -> None:
    torch.manual_seed(seed)
    check(tokens, width, dtype, apart)


@either_device
def test_a_group_of_zeros_and_the_largest_numbers() -> None:
    x = torch.zeros(2, 256, device=DEVICE)
    x[1, :128] = torch.linspace(-1e38, 1e38, 128)
    out = Fp8Rows.empty(2, 256, DEVICE)
    poison(out)
    triton.quantise_rows(x, out)
    assert not dequantise(out)[0].any()
    assert not dequantise(out)[1, 128:].any()
    assert error_ratio(dequantise(out)[1], x[1]) < TOLERANCE[torch.float8_e4m3fn]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1536, 7168, 18432])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_equals_naive_at_full_size(tokens: int, width: int) -> None:
    check(tokens, width, torch.bfloat16)


@pytest.mark.gpu
def test_the_same_from_a_graph() -> None:
    x, out = torch.zeros(64, 7168, device=DEVICE).bfloat16(), Fp8Rows.empty(64, 7168, DEVICE)

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        x.normal_()

    same_from_graph(lambda: triton.quantise_rows(x, out), refill, (out.data, out.scale))


@pytest.mark.parametrize("x", [torch.zeros(2, 192), torch.zeros(128, 2).T], ids=["half", "columns"])
def test_rows_that_are_none_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="128 must divide them"):
        triton.quantise_rows(x, Fp8Rows.empty(2, 256, "cpu"))


# ---- blocks of a weight


def check_blocks(rows: int, columns: int, dtype: torch.dtype, apart: bool = False) -> None:
    w = torch.randn(rows, 2 * columns if apart else columns, device=DEVICE).to(dtype)[:, :columns]
    w *= torch.logspace(-6, 4, rows, device=DEVICE).unsqueeze(1).to(dtype)
    want = naive.quantise_blocks(w)
    data = torch.empty(rows, columns + 128 * apart, dtype=torch.float8_e4m3fn, device=DEVICE)[:, :columns]
    out = Fp8Blocks(data, torch.empty(want.scale.shape, device=DEVICE))
    poison(out)
    triton.quantise_blocks(w, out)
    assert torch.equal(out.scale, want.scale)
    assert torch.equal(out.data.float(), want.data.float())


@either_device
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 400),
    dtype=st.sampled_from(DTYPES),
    apart=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_blocks_are_naive_s(rows: int, columns: int, dtype: torch.dtype, apart: bool, seed: int) -> None:
    torch.manual_seed(seed)
    check_blocks(rows, columns, dtype, apart)


@either_device
def test_a_block_of_zeros_and_the_largest_numbers() -> None:
    w = torch.zeros(128, 256, device=DEVICE)
    w[:, :128] = torch.linspace(-1e38, 1e38, 128)
    out = Fp8Blocks.empty((128, 256), DEVICE)
    triton.quantise_blocks(w, out)
    assert not dequantise(out)[:, 128:].any()
    assert error_ratio(dequantise(out)[:, :128], w[:, :128]) < TOLERANCE[torch.float8_e4m3fn]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_at_full_size_are_those_of_a_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w = torch.randn(7168, 2048, device=DEVICE).to(dtype)
    got, want = quantise_blocks(w), naive.quantise_blocks(w.cpu())
    assert torch.equal(got.scale.cpu(), want.scale) and torch.equal(got.data.cpu().float(), want.data.float())


def test_blocks_go_where_they_are_wanted() -> None:
    w, out = torch.randn(200, 130), Fp8Blocks.empty((200, 130), "cpu")
    assert quantise_blocks(w, out) is out
    again = quantise_blocks(w)
    assert torch.equal(out.data.float(), again.data.float()) and torch.equal(out.scale, again.scale)


@either_device
def test_a_damaged_weight_is_not_made_a_number() -> None:
    w = torch.ones(256, 256, device=DEVICE)
    w[3, 200] = torch.nan
    out = Fp8Blocks.empty((256, 256), DEVICE)
    triton.quantise_blocks(w, out)
    assert (
        out.scale.isnan().tolist() == naive.quantise_blocks(w).scale.isnan().tolist() == [[False, True], [False, False]]
    )


def test_columns_apart_are_refused() -> None:
    out = naive.quantise_blocks(torch.zeros(128, 2))
    with pytest.raises(ValueError, match="side by side"):
        triton.quantise_blocks(torch.zeros(2, 128).T, out)

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.quant import naive, triton
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

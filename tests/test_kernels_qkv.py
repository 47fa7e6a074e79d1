from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.pages import PAGE
from kernels.latent_cache import Fp8Latent, page_bytes
from kernels.qkv_norm_rope_write import naive, triton
from kernels.qkv_norm_rope_write.naive import QkvWeights
from kernels.quant.naive import Fp8Rows, dequantise
from tests.kernel_checks import (
    DEVICE,
    TOLERANCE,
    either_device,
    error_ratio,
    poison,
    poisoned,
    same_from_graph,
)

PAGES = 3


@dataclass(frozen=True)
class Shape:
    kv_lora: int
    rope: int
    nope: int
    heads: int
    q_lora: int  # 0: none


R1 = Shape(512, 64, 128, 128, 1536)
V2_LITE = Shape(512, 64, 128, 16, 0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def weights(s: Shape, dtype: torch.dtype, bias: bool, queries_first: bool) -> QkvWeights:
    """Of the fused part alone: the products are kernels.linear's."""
    columns = s.kv_lora + s.rope + (s.q_lora or s.heads * (s.nope + s.rope))
    norm = 1 + 0.1 * normal(s.q_lora).to(dtype) if s.q_lora else None
    a = torch.empty(1, columns, device=DEVICE)
    kv_norm = 1 + 0.1 * normal(s.kv_lora).to(dtype)
    return QkvWeights(a, normal(columns, dtype=dtype) if bias else None, kv_norm, norm, None, queries_first)


def wide(w: QkvWeights) -> QkvWeights:
    return replace(w, kv_norm=w.kv_norm.float(), q_norm=None if w.q_norm is None else w.q_norm.float())


def new_cache(s: Shape, dtype: torch.dtype, fp8: bool, pages: int) -> Tensor | Fp8Latent:
    if not fp8:
        return torch.zeros(pages, PAGE, s.kv_lora + s.rope, device=DEVICE, dtype=dtype)
    flat = torch.zeros(pages, page_bytes(s.kv_lora, s.rope), device=DEVICE, dtype=torch.uint8)
    return Fp8Latent.of(flat, s.kv_lora, s.rope)


def cache_rows(cache: Tensor | Fp8Latent) -> Tensor:
    return cache.rows() if isinstance(cache, Fp8Latent) else cache


def turned(tokens: int, rope: int, by_position: bool) -> tuple[Tensor, Tensor | None]:
    table = torch.polar(torch.ones(500, rope // 2), torch.rand(500, rope // 2) * 7).to(DEVICE)
    positions = torch.randint(500, (tokens,), device=DEVICE)
    return (table, positions) if by_position else (table[positions].unsqueeze(1), None)


def check(
    s: Shape,
    tokens: int,
    dtype: torch.dtype,
    *,
    fp8: bool,
    bias: bool = False,
    queries_first: bool = False,
    by_position: bool = True,
    pages: int = PAGES,
) -> None:
    w, width = weights(s, dtype, bias, queries_first), s.kv_lora + s.rope
    a = normal(tokens, w.a.shape[1], dtype=dtype)  # type: ignore[union-attr]
    turns, positions = turned(tokens, s.rope, by_position)
    write = torch.randperm(pages * PAGE, device=DEVICE)[:tokens]
    cache, want_cache = new_cache(s, dtype, fp8, pages), new_cache(s, torch.float32, False, pages)
    shape = (tokens, s.q_lora) if s.q_lora else (tokens, s.heads, s.nope + s.rope)
    quantised = fp8 and s.q_lora > 0
    q: Tensor | Fp8Rows = poisoned(*shape, dtype=dtype)
    if quantised:
        q = Fp8Rows.empty(tokens, s.q_lora, DEVICE)
        poison(q)
    want = poisoned(*shape, dtype=torch.float32)
    with_bias = a.float() + (0.0 if w.a_bias is None else w.a_bias.float())  # naive writes over it
    row, queries = w.split(with_bias, width)
    naive.norm_rope_write(row, queries, wide(w), naive.of_rows(turns, positions), write, want_cache, want)
    triton.norm_rope_write(*w.split(a, width), w, turns, write, cache, q, positions)
    tolerance = TOLERANCE[torch.float8_e4m3fn if fp8 else dtype]
    assert error_ratio(cache_rows(cache), cache_rows(want_cache)) < tolerance
    got = dequantise(q) if isinstance(q, Fp8Rows) else q
    assert error_ratio(got, want) < (tolerance if quantised else TOLERANCE[dtype])


shapes = st.builds(
    Shape,
    kv_lora=st.sampled_from([128, 256, 512]),
    rope=st.sampled_from([32, 64]),
    nope=st.sampled_from([32, 96, 128]),
    heads=st.sampled_from([1, 4, 5, 20]),
    q_lora=st.sampled_from([0, 128, 384]),
)


@either_device
@settings(deadline=None, max_examples=25)
@given(
    s=shapes,
    tokens=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    fp8=st.booleans(),
    bias=st.booleans(),
    queries_first=st.booleans(),
    by_position=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_equals_naive(
    s: Shape,
    tokens: int,
    dtype: torch.dtype,
    fp8: bool,
    bias: bool,
    queries_first: bool,
    by_position: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    check(s, tokens, dtype, fp8=fp8, bias=bias, queries_first=queries_first, by_position=by_position)


@either_device
@settings(deadline=None, max_examples=15)
@given(
    s=shapes,
    tokens=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    place=st.sampled_from(["in place", "absorbed"]),
    seed=st.integers(0, 1 << 30),
)
def test_rope_q_equals_naive(s: Shape, tokens: int, dtype: torch.dtype, place: str, seed: int) -> None:
    torch.manual_seed(seed)
    q = normal(tokens, s.heads, s.nope + s.rope, dtype=dtype)
    turns, positions = turned(tokens, s.rope, True)
    want = torch.empty(tokens, s.heads, s.rope, device=DEVICE)
    naive.rope_q(q.float(), naive.of_rows(turns, positions), want)
    whole = q.clone() if place == "in place" else poisoned(tokens, s.heads, s.kv_lora + s.rope, dtype=dtype)
    out = whole[:, :, whole.shape[2] - s.rope :]
    before = whole[:, :, : -s.rope].clone()
    triton.rope_q(whole if place == "in place" else q, turns, out, positions)
    assert error_ratio(out, want) < TOLERANCE[dtype]
    assert whole[:, :, : -s.rope].equal(before) or place == "absorbed"


@either_device
def test_padding_rows_write_nothing() -> None:
    w, s = weights(V2_LITE, torch.float32, False, False), V2_LITE
    a, cache = normal(2, w.a.shape[1]), new_cache(s, torch.float32, False, 1)  # type: ignore[union-attr]
    turns, positions = turned(2, s.rope, True)
    q = poisoned(2, s.heads, s.nope + s.rope, dtype=torch.float32)
    write = torch.tensor([-1, 7], device=DEVICE)
    triton.norm_rope_write(*w.split(a, s.kv_lora + s.rope), w, turns, write, cache, q, positions)
    assert isinstance(cache, Tensor)
    assert cache[0].any(1).nonzero().flatten().tolist() == [7]
    assert q.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("s", [R1, V2_LITE], ids=["R1", "V2-Lite"])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_equals_naive_at_full_size(tokens: int, s: Shape, fp8: bool) -> None:
    check(s, tokens, torch.bfloat16, fp8=fp8, queries_first=True, pages=70)


@pytest.mark.gpu
@pytest.mark.parametrize("s", [R1, V2_LITE], ids=["R1", "V2-Lite"])
def test_the_whole_equals_naive(s: Shape) -> None:
    hidden, tokens, dtype = 1024, 20, torch.bfloat16
    w = weights(s, dtype, False, False)
    columns = w.a.shape[1]  # type: ignore[union-attr]
    b = normal(s.heads * (s.nope + s.rope), s.q_lora, dtype=dtype).mT * s.q_lora**-0.5 if s.q_lora else None
    w = replace(w, a=(normal(columns, hidden, dtype=dtype) * hidden**-0.5).mT, b=b)
    x, q = normal(tokens, hidden, dtype=dtype), poisoned(tokens, s.heads, s.nope + s.rope, dtype=dtype)
    turns, positions = turned(tokens, s.rope, True)
    write = torch.randperm(PAGES * PAGE, device=DEVICE)[:tokens]
    cache, want_cache = new_cache(s, dtype, False, PAGES), new_cache(s, torch.float32, False, PAGES)
    want = torch.empty(q.shape, device=DEVICE)
    exact = replace(wide(w), a=w.a.float(), b=None if w.b is None else w.b.float())  # type: ignore[union-attr]
    naive.qkv_norm_rope_write(x.float(), exact, turns, write, want_cache, want, positions)
    q_low = poisoned(tokens, s.q_lora, dtype=dtype) if s.q_lora else None
    scratch = triton.QkvScratch(poisoned(tokens, columns, dtype=dtype), q_low)
    triton.qkv_norm_rope_write(x, w, turns, write, cache, q, positions, scratch)
    assert error_ratio(cache_rows(cache), cache_rows(want_cache)) < TOLERANCE[dtype]
    assert error_ratio(q, want) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_the_same_from_a_graph() -> None:
    s, tokens = R1, 16
    w = weights(s, torch.bfloat16, False, True)
    a = normal(tokens, w.a.shape[1], dtype=torch.bfloat16)  # type: ignore[union-attr]
    turns, positions = turned(tokens, s.rope, True)
    write, cache = torch.arange(tokens, device=DEVICE), new_cache(s, torch.bfloat16, True, 1)
    q = Fp8Rows.empty(tokens, s.q_lora, DEVICE)
    assert isinstance(cache, Fp8Latent) and positions is not None

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        a.normal_()
        positions.random_(0, 500)

    def launch() -> None:
        triton.norm_rope_write(*w.split(a, s.kv_lora + s.rope), w, turns, write, cache, q, positions)

    same_from_graph(launch, refill, (cache.data, cache.scale, cache.rope, q.data, q.scale))

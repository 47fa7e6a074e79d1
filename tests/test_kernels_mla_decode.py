from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.pages import PAGE
from kernels.latent_cache import Fp8Latent, page_bytes
from kernels.mla_decode import naive, triton
from kernels.mla_decode.plan import DecodePlan
from kernels.quant.naive import GROUP, Fp8Rows, quantise_rows
from kernels.quant.triton import quantise_rows as quantise_on_device
from kernels.target import current
from tests.kernel_checks import DEVICE, TOLERANCE, either_device, error_ratio, poison, same_codes, same_from_graph

GPU = DEVICE == "cuda"
STREAMED = {"bm": 32, "bn": GROUP, "warps": 8, "bk": 64, "stages": 4}
TYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
"""The interpreter's bfloat16 products are no measure; float32 pages do not fit a processor."""


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def pages_for(contexts: list[int], latent: int, rope: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a cache with the contexts' pages in random places, the block table)."""
    most = max(1, *(-(-length // PAGE) for length in contexts))
    total = len(contexts) * most + 3
    order = torch.randperm(total, device=DEVICE)[: len(contexts) * most].int()
    cache = torch.randn(total, PAGE, latent + rope, device=DEVICE).to(dtype)
    return cache, order.view(len(contexts), most)


def as_fp8(cache: Tensor, latent: int, rope: int) -> Fp8Latent:
    held = torch.empty(len(cache), page_bytes(latent, rope), dtype=torch.uint8, device=DEVICE)
    coded = Fp8Latent.of(held, latent, rope, current().fp8)
    quantise_rows(cache[..., :latent], Fp8Rows(coded.data, coded.scale))
    coded.rope.copy_(cache[..., latent:])
    return coded


def check(
    contexts: list[int], q_tokens: int, heads: int, latent: int, rope: int, dtype: torch.dtype, fp8: bool = False,
    tile: dict[str, int] | None = None,
) -> None:  # fmt: skip
    n = len(contexts)
    cache, table = pages_for(contexts, latent, rope, torch.bfloat16 if fp8 else dtype)
    # Noise in fp8 is 2.6 % of a value, and what reaches the scores comes on top: they are kept small.
    q = (0.3 * torch.randn(n, q_tokens, heads, latent + rope, device=DEVICE)).to(dtype)
    context, scale = int32(contexts), (latent + rope) ** -0.5
    plan = triton.decode_plan(n, q_tokens, heads, latent, rope, dtype, DEVICE, fp8=fp8, tile=tile)
    out = torch.empty(n, q_tokens, heads, latent, dtype=dtype, device=DEVICE)
    poison(out, plan.begin, plan.joins, plan.count, plan.pieces, plan.lse)
    triton.plan_decode(context, plan)
    held = as_fp8(cache, latent, rope) if fp8 else cache
    triton.attend(q, held, table, context, plan, scale, out)
    want = torch.empty_like(out, dtype=torch.float32)
    naive.attend(q, held, table, context, scale, want)
    assert error_ratio(out, want) < TOLERANCE[dtype]
    if fp8 and min(contexts) > PAGE:  # a handful of numbers may all be unlucky
        naive.attend(q, cache, table, context, scale, want)
        assert error_ratio(out, want) < TOLERANCE[torch.float8_e4m3fn]


lengths = st.one_of(st.integers(0, 3), st.integers(1, 300), st.sampled_from([63, 64, 65, 128, 640]))


@either_device
@settings(deadline=None, max_examples=15)
@given(
    contexts=st.lists(lengths, min_size=1, max_size=5),
    q_tokens=st.integers(1, 4),
    heads=st.sampled_from([4, 5, 16, 17, 40]),
    latent=st.sampled_from([128, 256]),
    rope=st.sampled_from([32, 64]),
    dtype=st.sampled_from(TYPES),
    fp8=st.booleans(),
    least=st.integers(1, 3),
    seed=st.integers(0, 1 << 30),
)
def test_attention_equals_naive(
    contexts: list[int], q_tokens: int, heads: int, latent: int, rope: int, dtype: torch.dtype, fp8: bool,
    least: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    tile = triton.tile_rule(len(contexts), q_tokens * heads, latent, rope, fp8) | {"least": least}
    check(contexts, q_tokens, heads, latent, rope, dtype, fp8, tile)


@either_device
@settings(deadline=None, max_examples=8)
@given(n=st.integers(0, 5), heads=st.sampled_from([4, 7]), nope=st.sampled_from([64, 96]), seed=st.integers(0, 1 << 30))
def test_decode_equals_naive(n: int, heads: int, nope: int, seed: int) -> None:
    """The whole operation: queries absorbed, attention, and back; weights as the checkpoint lays them out."""
    torch.manual_seed(seed)
    latent, rope, v_dim, dtype = 128, 64, 48, TYPES[0]
    contexts = torch.randint(1, 200, (n,)).tolist()
    cache, table = pages_for([*contexts, 1], latent, rope, dtype)
    table, context = table[:n], int32(contexts)
    q = torch.randn(n, heads, nope + rope, device=DEVICE).to(dtype)
    w_uk = torch.randn(heads, nope, latent, device=DEVICE).to(dtype) * nope**-0.5
    w_uv = torch.randn(heads, v_dim, latent, device=DEVICE).to(dtype).mT * latent**-0.5
    out = torch.empty(n, heads, v_dim, dtype=dtype, device=DEVICE)
    plan = triton.decode_plan(n, 1, heads, latent, rope, dtype, DEVICE)
    poison(out, plan.pieces, plan.lse, plan.absorbed, plan.latent)
    triton.plan_decode(context, plan)
    triton.mla_decode(q, w_uk, w_uv, cache, table, context, plan, 0.1, out)
    want = torch.empty_like(out, dtype=torch.float32, device="cpu")
    step = naive.plan_decode(context.cpu(), table.shape[1])
    cpu = [t.float().cpu() for t in (q, w_uk, w_uv, cache)]
    naive.mla_decode(*cpu, table.long().cpu(), step, 0.1, want)
    assert error_ratio(out.cpu(), want) < TOLERANCE[dtype]


def check_coded(tokens: int, heads: int, latent: int, dtype: torch.dtype, tile: dict[str, int] | None = None) -> None:
    """A projection in 8 bits has the bits of one that is coded after."""
    x = torch.randn(tokens, heads, latent, device=DEVICE).to(dtype)
    w = torch.randn(heads, GROUP, latent, device=DEVICE).to(dtype).mT * latent**-0.5
    out, want = (Fp8Rows.empty(tokens, heads * GROUP, DEVICE, current().fp8) for _ in range(2))
    wide = torch.empty(tokens, heads, GROUP, dtype=dtype, device=DEVICE)
    poison(out, wide)
    triton.project(x, w, out, tile)
    # The same tile: another sums in another order.
    triton.project(x, w, wide, tile or triton.projection_rule(tokens, heads, latent, GROUP, coded=True))
    quantise_on_device(wide.flatten(1), want)
    assert same_codes(out, want)


@either_device
@settings(deadline=None, max_examples=8)
@given(
    tokens=st.integers(0, 40), heads=st.sampled_from([1, 4, 7]), latent=st.sampled_from([128, 256]),
    dtype=st.sampled_from(TYPES), streamed=st.booleans(), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_a_projection_in_8_bits(
    tokens: int, heads: int, latent: int, dtype: torch.dtype, streamed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    check_coded(tokens, heads, latent, dtype, STREAMED if streamed else None)


@either_device
def test_a_projection_is_of_whole_groups_and_pieces() -> None:
    x, w = torch.zeros(2, 3, 128, device=DEVICE), torch.zeros(3, 128, GROUP, device=DEVICE)
    with pytest.raises(ValueError, match="a scale of its own"):
        triton.project(x, w[..., :64], Fp8Rows.empty(2, 3 * 64, DEVICE, current().fp8))
    with pytest.raises(ValueError, match="does not divide"):
        triton.project(x[..., :96], w[:, :96], x, STREAMED)


# ---- the schedule


def pieces_of(plan: DecodePlan, context: list[int]) -> list[list[tuple[int, int, int]]]:
    """What each part does: (request, first page, page after its last)."""
    begin, found = plan.begin.tolist(), []
    for (request, page), (end, end_page) in pairwise(begin):
        pages = [(r, -(-context[r] // PAGE) if r < end else end_page) for r in range(request, end + (end_page > 0))]
        found.append([(r, page if r == request else 0, stop) for r, stop in pages])
    return found


@either_device
@settings(deadline=None, max_examples=40)
@given(
    contexts=st.lists(st.one_of(lengths, st.integers(0, 40_000)), max_size=12),
    setup=st.integers(1, 5), least=st.integers(1, 4), join=st.integers(0, 8), parts=st.integers(1, 40),
)  # fmt: skip
def test_every_page_lies_in_one_part(contexts: list[int], setup: int, least: int, join: int, parts: int) -> None:
    tile = {"rows": 16, "setup": setup, "least": least, "join": join, "programs": 1}
    plan = DecodePlan.empty(len(contexts), 1, 4, 128, 32, tile, parts, DEVICE, torch.float16)
    poison(plan.begin, plan.joins, plan.count)
    triton.plan_decode(int32(contexts), plan)
    work = pieces_of(plan, contexts)
    assert len(work) == parts
    pages = [-(-length // PAGE) for length in contexts]
    for request, count in enumerate(pages):
        held = [(k, first, stop) for k, part in enumerate(work) for r, first, stop in part if r == request]
        assert [first for _, first, _ in held] == [0, *(stop for _, _, stop in held[:-1])]
        assert held[-1][2] == count
        assert [k for k, _, _ in held] == list(range(held[0][0], held[-1][0] + 1))
        assert all(stop - first >= least for _, first, stop in held[:-1])
    joined = {r: (first, last) for r, first, last in plan.joins[: int(plan.count)].tolist()}
    spans = {r: [k for k, part in enumerate(work) if any(p[0] == r for p in part)] for r in range(len(contexts))}
    assert joined == {r: (ks[0], ks[-1]) for r, ks in spans.items() if len(ks) > 1}
    costs = [sum(stop - first + setup for _, first, stop in part) for part in work]
    assert max(costs) <= max(-(-(sum(pages) + setup * len(pages)) // parts), setup + least) + setup + least + join


@either_device
def test_nothing_is_cut_for_less_than_joining_costs() -> None:
    """32 requests of 8 pages over 40 parts: cut, no part would have 8, but the pieces would have to be joined."""
    counts = {}
    for join in (0, 4):
        tile = {"rows": 16, "setup": 1, "least": 1, "join": join, "programs": 1}
        plan = DecodePlan.empty(32, 1, 4, 128, 32, tile, 40, DEVICE, torch.float16)
        triton.plan_decode(int32([8 * PAGE] * 32), plan)
        counts[join] = int(plan.count)
    assert counts[0] > 0
    assert counts[4] == 0


# ---- full size


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [128, 16], ids=["R1", "V2-Lite"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("n", "context"), [(1, 131_072), (4, 1024), (64, 8192), (200, 700)])
def test_attention_equals_naive_at_full_size(n: int, context: int, heads: int, fp8: bool) -> None:
    torch.manual_seed(n)
    contexts = torch.randint(context // 2, context + 1, (n,)).tolist()
    check(contexts, 1, heads, 512, 64, torch.bfloat16, fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 24, 64, 256])
@pytest.mark.parametrize("tile", [None, STREAMED], ids=["rule", "streamed"])
def test_a_projection_in_8_bits_at_full_size(tokens: int, tile: dict[str, int] | None) -> None:
    torch.manual_seed(tokens)
    check_coded(tokens, 128, 512, torch.bfloat16, tile)


@pytest.mark.gpu
@pytest.mark.parametrize("q_tokens", [2, 3, 4])
@pytest.mark.parametrize("heads", [128, 16, 8, 5])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_several_query_tokens(q_tokens: int, heads: int, fp8: bool) -> None:
    torch.manual_seed(q_tokens)
    check([q_tokens, 64, 65, 66, 127, 129, 4000, 0, 193], q_tokens, heads, 512, 64, torch.bfloat16, fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("hopper", [0, 1], ids=["portable", "hopper"])
def test_both_bodies(hopper: int) -> None:
    for heads in (16, 32, 128):
        tile = triton.tile_rule(9, heads, 512, 64, False) | {"hopper": hopper}
        check([1, 64, 1000, 5000, 63, 2, 640, 8000, 300], 1, heads, 512, 64, torch.bfloat16, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "fp8"), [(128, False), (16, False), (16, True), (128, True)])
@pytest.mark.parametrize("max_context", [1024, 4096], ids=["short", "long"])
def test_the_same_from_a_graph(heads: int, fp8: bool, max_context: int) -> None:
    """With contexts that change from replay to replay, and so with another schedule each time."""
    n, most = 16, 40
    cache, table = pages_for([most * PAGE] * n, 512, 64, torch.bfloat16)
    held = as_fp8(cache, 512, 64) if fp8 else cache
    q = torch.randn(n, 1, heads, 576, device=DEVICE).bfloat16()
    context = int32([1] * n)
    plan = triton.decode_plan(n, 1, heads, 512, 64, torch.bfloat16, DEVICE, fp8=fp8, max_context=max_context)
    out = torch.empty(n, 1, heads, 512, dtype=torch.bfloat16, device=DEVICE)

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        q.normal_()
        context.random_(1, most * PAGE + 1)

    def launch() -> None:
        triton.plan_decode(context, plan)
        triton.attend(q, held, table, context, plan, 0.04, out)

    same_from_graph(launch, refill, (out,))

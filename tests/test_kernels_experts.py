from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.expert_plan import plan_experts
from kernels.experts import naive, triton
from kernels.experts.naive import slot_table
from kernels.experts.tiles import candidates, one_launch, parts_of, tile_for
from kernels.experts.work import ExpertWork
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows, quantise_rows
from tests.kernel_checks import DEVICE, TOLERANCE, either_device, error_ratio, poison, poisoned, same_from_graph

FP8 = torch.float8_e4m3fn
Stack = Tensor | Fp8Blocks


def stack(held: int, rows: int, columns: int, dtype: torch.dtype) -> Stack:
    """Random, of a spread that keeps activations near 1, and laid out as on a GPU: [held, columns, rows] in memory."""
    if dtype != FP8:
        return (torch.randn(held, columns, rows, device=DEVICE) / rows**0.5).to(dtype).mT
    data = torch.empty(held, columns, rows, device=DEVICE, dtype=FP8)
    for one in data:  # whole stacks of R1's in float32 would not fit
        one.copy_(torch.randn(columns, rows, device=DEVICE))
    scale = (0.5 + torch.rand(held, columns // GROUP, rows // GROUP, device=DEVICE)) / rows**0.5
    return Fp8Blocks(data.mT, scale.mT)


def activations(tokens: int, hidden: int, dtype: torch.dtype) -> Tensor | Fp8Rows:
    x = torch.randn(tokens, hidden, device=DEVICE)
    if dtype != FP8:
        return x.to(dtype)
    coded = Fp8Rows.empty(tokens, hidden, DEVICE)
    quantise_rows(x, coded)
    return coded


def choices(tokens: int, experts: int, topk: int, absent: float = 0.0) -> tuple[Tensor, Tensor]:
    """ids, some of them -1, and weights."""
    ids = torch.rand(tokens, experts, device=DEVICE).argsort(1)[:, :topk].int()
    ids[torch.rand(tokens, topk, device=DEVICE) < absent] = -1
    return ids, torch.rand(tokens, topk, device=DEVICE)


def table(held: list[int], experts: int) -> Tensor:
    return slot_table({expert: slot for slot, expert in enumerate(held)}, experts).to(DEVICE)


def run(
    x: Tensor | Fp8Rows, ids: Tensor, weights: Tensor, gate_up: Stack, down: Stack, slots: Tensor, out: Tensor,
    work: ExpertWork,
) -> None:  # fmt: skip
    plan_experts(ids, slots, len(gate_up.data), work.plan)
    triton.sum_slots(triton.grouped_ffn(x, weights, gate_up, down, work), out)


def scratch(tokens: int, topk: int, gate_up: Stack, dtype: torch.dtype, tile: Mapping | None) -> ExpertWork:
    (held, hidden, double), fp8 = gate_up.data.shape, dtype == FP8
    rows = torch.bfloat16 if fp8 and DEVICE == "cuda" else torch.float32 if fp8 else dtype
    work = ExpertWork.empty(tokens, topk, held, hidden, double // 2, fp8, DEVICE, rows, tile)
    poison(work.act, work.rows, work.plan.pairs, work.plan.places, work.plan.blocks, work.plan.counts)
    return work


def check(
    tokens: int, hidden: int, inter: int, experts: int, held: list[int], topk: int, dtype: torch.dtype,
    tile: Mapping | None, absent: float = 0.0, ids: Tensor | None = None,
) -> None:  # fmt: skip
    x, (random, weights) = activations(tokens, hidden, dtype), choices(tokens, experts, topk, absent)
    ids = random if ids is None else ids
    gate_up, down = stack(len(held), hidden, 2 * inter, dtype), stack(len(held), inter, hidden, dtype)
    slots, work = table(held, experts), scratch(tokens, topk, gate_up, dtype, tile)
    out = poisoned(tokens, hidden, dtype=work.rows.dtype)
    run(x, ids, weights, gate_up, down, slots, out, work)
    wide = ExpertWork.empty(tokens, topk, len(held), hidden, inter, dtype == FP8, DEVICE, torch.float32, work.tile)
    plan_experts(ids, slots, len(held), wide.plan)
    want = naive.grouped_ffn(x, weights, gate_up, down, wide).sum()
    assert error_ratio(out, want) < TOLERANCE[dtype]
    assert not want.any() or out.any()


@st.composite
def tiles(draw: st.DrawFn) -> dict:
    rows, swap = draw(st.sampled_from([16, 32])), draw(st.integers(0, 1))
    bn, bk, stages = draw(st.sampled_from([64, 128])), draw(st.sampled_from([64, 128])), draw(st.integers(1, 3))
    knobs = {"BN": bn, "BK": bk, "SWAP": swap, "TMA": 1, "PDL": 1, "warps": 4, "stages": stages, "prefetch": 128}
    return {"rows": rows} | {name: knobs | {"per_sm": draw(st.integers(0, 2))} for name in ("gate_up", "down")}


@either_device
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(0, 30),
    hidden=st.sampled_from([128, 256]),
    inter=st.sampled_from([48, 64, 128, 256]),
    held=st.lists(st.integers(0, 5), max_size=6, unique=True),
    topk=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, FP8]),
    tile=tiles(),
    absent=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1 << 30),
)
def test_equals_naive(
    tokens: int, hidden: int, inter: int, held: list[int], topk: int, dtype: torch.dtype, tile: dict, absent: float,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    inter = inter if dtype != FP8 else max(inter // GROUP, 1) * GROUP
    check(tokens, hidden, inter, 6, held, topk, dtype, tile, absent)


def test_naive_of_blocks_equals_naive_of_experts() -> None:
    x, (ids, weights) = torch.randn(20, 128), choices(20, 6, 3, 0.2)
    ids, weights = ids.cpu(), weights.cpu()
    gate_up, down, slots = torch.randn(4, 128, 64), torch.randn(4, 32, 128), table([5, 0, 2, 3], 6).cpu()
    work = ExpertWork.empty(20, 3, 4, 128, 32, False, "cpu", torch.float32)
    plan_experts(ids, slots, 4, work.plan)
    want, got = torch.empty(20, 128), naive.grouped_ffn(x, weights, gate_up, down, work).sum()
    naive.experts(x, ids, weights, gate_up, down, slots, want)
    assert error_ratio(got, want) < 1e-5


R1 = 7168, 2048, 256, 8, FP8
V2_LITE = 2048, 1408, 64, 6, torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "inter", "experts", "topk", "dtype"), [R1, V2_LITE], ids=["R1", "V2-Lite"])
@pytest.mark.parametrize("tokens", [1, 4, 8, 9, 16, 64, 128, 1024, 4096])
def test_equals_naive_at_full_size(
    tokens: int, hidden: int, inter: int, experts: int, topk: int, dtype: torch.dtype
) -> None:
    check(tokens, hidden, inter, experts, list(range(experts)), topk, dtype, None)


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "inter", "experts", "topk", "dtype"), [R1, V2_LITE], ids=["R1", "V2-Lite"])
@pytest.mark.parametrize("absent", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", range(1, 9))
def test_few_tokens_in_one_launch(
    tokens: int, absent: float, hidden: int, inter: int, experts: int, topk: int, dtype: torch.dtype
) -> None:
    hidden, inter = (256, inter) if tokens % 2 else (hidden, 128)  # narrow: fewer tiles than processors, or short ones
    held, tile = list(range(1, experts, 3)), one_launch(tokens, dtype == FP8, stages=3)
    check(tokens, hidden, inter, experts, held, topk, dtype, tile, absent)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "counts", [[1], [0, 1, 7, 8, 9, 0, 15, 17], [40, 0, 31, 33, 2], [0, 0], [128], [1] * 120], ids=str
)
def test_blocks_of_every_length_in_one_launch(counts: list[int], dtype: torch.dtype, rows: int) -> None:
    """As many pairs as `counts` says of each expert, and of one that is not held."""
    held = len(counts)
    ids = torch.arange(held + 1, device=DEVICE).repeat_interleave(torch.tensor([*counts, 5], device=DEVICE))
    ids = ids[torch.randperm(len(ids), device=DEVICE), None]
    if rows == 8:
        ids = ids[:8]
    if rows == 64 and dtype == FP8:
        pytest.skip("too many registers: nobody takes it")
    tile = one_launch(len(ids), dtype == FP8, rows=rows)
    check(len(ids), 512, 384, held + 1, list(range(held)), 1, dtype, tile, ids=ids)


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "inter", "dtype"), [(7168, 18432, FP8), (2048, 10944, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 33, 64, 128])
def test_an_ffn_in_parts(tokens: int, hidden: int, inter: int, dtype: torch.dtype) -> None:
    """As a dense layer's, full size: the whole expert's products of the same codes, as naive has them."""
    from services.gpu_worker.work import MlpWork

    parts = parts_of(tokens, hidden, inter, dtype == FP8, dtype)
    assert parts == 9
    x, weights = activations(tokens, hidden, dtype), torch.ones(tokens, 1, device=DEVICE)
    gate_up, down = stack(1, hidden, 2 * inter, dtype), stack(1, inter, hidden, dtype)
    cut = MlpWork.empty(tokens, hidden, inter, dtype == FP8, torch.bfloat16, parts)
    poison(cut.experts.act, cut.experts.rows)
    out = poisoned(tokens, hidden, dtype=torch.bfloat16)
    triton.sum_slots(triton.grouped_ffn(x, cut.weights, gate_up, down, cut.experts), out)
    whole = ExpertWork.empty(tokens, 1, 1, hidden, inter, dtype == FP8, DEVICE, torch.float32, {"rows": 16})
    plan_experts(torch.zeros(tokens, 1, dtype=torch.int32, device=DEVICE), table([0], 1), 1, whole.plan)
    want = naive.grouped_ffn(x, weights, gate_up, down, whole).sum()
    assert error_ratio(out, want) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [t for t in candidates(1024, 8, 256, True) if "deep" in t["gate_up"]], ids=str)
@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [256, 1024])
@pytest.mark.parametrize("counts", [[1], [0, 1, 129, 64, 65, 128, 0, 320, 63], [0, 0], [70] * 40], ids=str)
def test_blocks_of_every_length(counts: list[int], hidden: int, dtype: torch.dtype, tile: dict) -> None:
    """As many pairs as `counts` says of each expert, and of one that is not held."""
    held = len(counts)
    ids = torch.arange(held + 1, device=DEVICE).repeat_interleave(torch.tensor([*counts, 9], device=DEVICE))
    ids = ids[torch.randperm(len(ids), device=DEVICE), None]
    check(len(ids), hidden, 256, held + 1, list(range(held)), 1, dtype, tile, ids=ids)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_a_shard_at_full_size(tokens: int) -> None:
    hidden, inter, experts, topk, dtype = R1
    check(tokens, hidden, inter, experts, list(range(3, experts, 8)), topk, dtype, None, absent=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "inter", "experts", "topk", "dtype"), [R1, V2_LITE], ids=["R1", "V2-Lite"])
@pytest.mark.parametrize("tokens", [1, 8, 32, 512])
def test_the_same_from_a_graph(
    tokens: int, hidden: int, inter: int, experts: int, topk: int, dtype: torch.dtype
) -> None:
    held = list(range(0, experts, 2))
    gate_up, down = stack(len(held), hidden, 2 * inter, dtype), stack(len(held), inter, hidden, dtype)
    x, slots = activations(tokens, hidden, dtype), table(held, experts)
    ids, weights = choices(tokens, experts, topk)
    tile = tile_for(tokens, topk, len(held), hidden, inter, dtype == FP8)
    work = scratch(tokens, topk, gate_up, dtype, tile)
    out = poisoned(tokens, hidden, dtype=torch.bfloat16)

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        fresh, (new_ids, new_weights) = activations(tokens, hidden, dtype), choices(tokens, experts, topk, 0.1)
        for old, new in ((x, fresh), (ids, new_ids), (weights, new_weights)):
            for part, value in zip(parts(old), parts(new), strict=True):
                part.copy_(value)

    def launch() -> None:
        run(x, ids, weights, gate_up, down, slots, out, work)

    same_from_graph(launch, refill, (out,), runs=1000)


def parts(x: Tensor | Fp8Rows) -> tuple[Tensor, ...]:
    return (x.data, x.scale) if isinstance(x, Fp8Rows) else (x,)

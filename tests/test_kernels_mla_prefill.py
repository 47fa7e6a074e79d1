from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.pages import PAGE
from kernels.latent_cache import Fp8Latent, page_bytes
from kernels.mla_prefill import naive, triton
from kernels.mla_prefill.plan import PrefillPlan, PrefillScratch
from kernels.quant.naive import Fp8Rows, quantise_rows
from tests.kernel_checks import DEVICE, TOLERANCE, either_device, error_ratio, poison, poisoned, same_from_graph

KV_LORA = 128
SMALL = {"hopper": 0, "BM": 32, "BN": 16, "warps": 4, "stages": 1, "sweep": 2}
# torch's own products of bfloat16 crash on some CPUs.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    w_uk: Tensor
    w_uv: Tensor
    cache: Tensor | Fp8Latent
    plan: PrefillPlan
    scale: float

    def wide(self) -> Inputs:
        """The same in float32, for the naive version."""
        cache = self.cache.rows() if isinstance(self.cache, Fp8Latent) else self.cache.float()
        return replace(self, q=self.q.float(), w_uk=self.w_uk.float(), w_uv=self.w_uv.float(), cache=cache)


def inputs(
    chunks: list[tuple[int, int]], heads: int, widths: tuple[int, int, int], kv_lora: int, dtype: torch.dtype, fp8: bool
) -> Inputs:
    """chunks: (rows, tokens of context before them). What no context holds of the cache is NaN."""
    nope, rope, v_dim = widths
    contexts = [rows + before for rows, before in chunks]
    counts = [-(-context // PAGE) for context in contexts]
    pages = torch.randperm(sum(counts) + 2)[: sum(counts)].split(counts)
    rows = poisoned(sum(counts) + 2, PAGE, kv_lora + rope, dtype=torch.float32)
    for context, held in zip(contexts, pages, strict=True):
        places = (held.to(DEVICE)[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten()[:context]
        rows.view(-1, kv_lora + rope)[places] = torch.randn(context, kv_lora + rope, device=DEVICE)
    weights = (torch.randn(heads, nope + v_dim, kv_lora, device=DEVICE) / kv_lora**0.5).to(dtype)
    return Inputs(
        torch.randn(sum(n for n, _ in chunks), heads, nope + rope, device=DEVICE).to(dtype),
        weights[:, :nope],
        weights[:, nope:].mT,
        fp8_cache(rows, kv_lora) if fp8 else rows.to(dtype),
        PrefillPlan.of([n for n, _ in chunks], contexts, pages, DEVICE),
        (nope + rope) ** -0.5,
    )


def fp8_cache(rows: Tensor, kv_lora: int) -> Fp8Latent:
    pages, _, width = rows.shape
    cache = Fp8Latent.of(
        torch.zeros(pages, page_bytes(kv_lora, width - kv_lora), dtype=torch.uint8, device=DEVICE),
        kv_lora, width - kv_lora,
    )  # fmt: skip
    coded = Fp8Rows.empty(pages * PAGE, kv_lora, DEVICE)
    quantise_rows(rows[..., :kv_lora].flatten(0, 1), coded)
    cache.data.copy_(coded.data.view_as(cache.data))
    cache.scale.copy_(coded.scale.view_as(cache.scale))
    cache.rope.copy_(rows[..., kv_lora:])
    return cache


def check(given: Inputs, tile: dict | None, head_groups: int = 1, tight: bool = False) -> None:
    """`tight`: there is no room for the rest of the last page."""
    rows, heads = given.q.shape[:2]
    dtype, (kv_lora, v_dim), width = given.q.dtype, given.w_uv.shape[1:], given.w_uk.shape[1] + given.w_uv.shape[2]
    rope, tokens = given.q.shape[2] - given.w_uk.shape[1], given.plan.tokens
    room = tokens if tight else -(-tokens // PAGE) * PAGE
    scratch = PrefillScratch.empty(room, heads, width, kv_lora, rope, dtype, DEVICE)
    scratch = replace(scratch, expanded=scratch.expanded[: room * width * -(-heads // head_groups)])
    poison(scratch.latent, scratch.rope, scratch.expanded)
    out, want = poisoned(rows, heads, v_dim, dtype=dtype), poisoned(rows, heads, v_dim, dtype=torch.float32)
    wide = given.wide()
    naive.mla_prefill(wide.q, wide.w_uk, wide.w_uv, wide.cache, wide.plan, wide.scale, want)
    triton.mla_prefill(
        given.q, given.w_uk, given.w_uv, given.cache, given.plan, given.scale, out, scratch, tile
    )  # fmt: skip
    assert error_ratio(out, want) < TOLERANCE[dtype]


@either_device
@settings(deadline=None, max_examples=20)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 70), st.sampled_from([0, 0, 1, 64, 100])), max_size=3),
    heads=st.integers(1, 3),
    widths=st.sampled_from([(32, 32, 16), (48, 32, 80), (64, 64, 32)]),
    dtype=st.sampled_from(DTYPES),
    fp8=st.booleans(),
    loose=st.booleans(),
    head_groups=st.integers(1, 2),
    tight=st.booleans(),
    tile=st.sampled_from([None, SMALL]),
    seed=st.integers(0, 1 << 30),
)
def test_equals_naive(
    chunks: list[tuple[int, int]], heads: int, widths: tuple[int, int, int], dtype: torch.dtype, fp8: bool,
    loose: bool, head_groups: int, tight: bool, tile: dict | None, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    given = inputs(chunks, heads, widths, KV_LORA, dtype, fp8)
    if loose and chunks:  # bounds above what there is
        plan = replace(given.plan, tokens=given.plan.tokens + 70, most_rows=given.plan.most_rows + 40)
        given = replace(given, plan=plan)
    check(given, tile, head_groups, tight)


def test_weights_that_are_not_one_tensor_are_refused() -> None:
    w_uk, w_uv = torch.zeros(2, 16, 128), torch.zeros(2, 128, 16)
    with pytest.raises(ValueError, match="views of one tensor"):
        triton.joint(w_uk, w_uv)


R1, V2_LITE = (128, (128, 64, 128), 512), (16, (128, 64, 128), 512)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16-cache", "fp8-cache"])
@pytest.mark.parametrize("chunks", [[(1024, 1024)], [(1000, 0), (1, 700), (129, 65), (128, 0)]], ids=["one", "ragged"])
@pytest.mark.parametrize("model", [R1, V2_LITE], ids=["R1", "V2-Lite"])
def test_equals_naive_at_full_size(
    model: tuple[int, tuple[int, int, int], int], chunks: list[tuple[int, int]], fp8: bool
) -> None:
    heads, widths, kv_lora = model
    check(inputs(chunks, heads, widths, kv_lora, torch.bfloat16, fp8), None)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", triton.candidates(16, 1500), ids=str)
def test_every_candidate_equals_naive(tile: dict) -> None:
    heads, widths, kv_lora = V2_LITE
    check(inputs([(700, 100), (300, 400)], heads, widths, kv_lora, torch.bfloat16, False), tile)


@pytest.mark.gpu
def test_the_same_from_a_graph() -> None:
    heads, widths, kv_lora = V2_LITE
    given = inputs([(300, 0), (77, 130)], heads, widths, kv_lora, torch.bfloat16, False)
    assert isinstance(given.cache, Tensor)
    cache = given.cache
    scratch = PrefillScratch.empty(given.plan.tokens, heads, 256, kv_lora, 64, torch.bfloat16, DEVICE)
    out = poisoned(377, heads, 128, dtype=torch.bfloat16)

    def refill(seed: int) -> None:
        torch.manual_seed(seed)
        given.q.normal_()
        cache.normal_()

    same_from_graph(
        lambda: triton.mla_prefill(
            given.q, given.w_uk, given.w_uv, cache, given.plan, given.scale, out, scratch
        ),
        refill,
        (out,),
    )  # fmt: skip

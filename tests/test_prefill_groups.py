"""Prompts of a step whose contexts together exceed the room for them are attended in groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from common.pages import PAGE
from kernels.mla_prefill import MOST_CHUNKS
from services.gpu_worker.batch import Chunk
from services.gpu_worker.model import _prefill_plans


def chunks(*sizes: tuple[int, int], first: int = 0) -> list[Chunk]:
    found = []
    for rows, context in sizes:
        found.append(Chunk(first, rows, context, torch.zeros(-(-context // PAGE), dtype=torch.int64)))
        first += rows
    return found


@pytest.mark.parametrize(
    ("room", "groups"),
    [(0, [[100, 60, 300, 40]]), (500, [[100, 60, 300, 40]]), (499, [[100, 60, 300], [40]]),
     (340, [[100, 60], [300, 40]]), (150, [[100], [60], [300], [40]]), (10, [[100], [60], [300], [40]])],
)  # fmt: skip
def test_a_group_has_room_or_is_one_prompt(room: int, groups: list[list[int]]) -> None:
    plans = _prefill_plans(chunks((10, 100), (2, 60), (200, 300), (40, 40), first=5), room, "cpu")
    assert [plan.contexts.tolist() for _, _, plan in plans] == groups
    rows = [rows for _, _, plan in plans for rows in plan.cu_rows.diff().tolist()]
    assert rows == [10, 2, 200, 40]
    ends = [5, *(end for _, end, _ in plans)]
    assert [(first, end) for first, end, _ in plans] == list(pairwise(ends)) and ends[-1] == 257


def test_a_group_has_no_more_prompts_than_kernels_are_compiled_for() -> None:
    plans = _prefill_plans(chunks(*[(2, 2)] * (2 * MOST_CHUNKS + 1)), 1 << 20, "cpu")
    assert [len(plan.contexts) for _, _, plan in plans] == [MOST_CHUNKS, MOST_CHUNKS, 1]


def test_no_prompt_has_no_group() -> None:
    assert _prefill_plans((), 64, "cpu") == []

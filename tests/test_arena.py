"""The memory that the works of a prefill's sizes share."""

from __future__ import annotations

import torch
from torch import Tensor

from services.gpu_worker.graphs import prefill_buckets
from services.gpu_worker.work import ALIGNED, Arena


def turn(arena: Arena, *sizes: tuple[int, int]) -> list[Tensor]:
    """float32 tensors."""
    empty = arena.turn()
    return [empty(*size, dtype=torch.float32, device="cpu") for size in sizes]


def span(x: Tensor) -> range:
    return range(x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize)


def test_those_of_a_turn_lie_apart_and_where_an_earlier_turns_lay() -> None:
    arena = Arena()
    first = turn(arena, (64, 100), (64, 30))
    second = turn(arena, (20, 30), (8, 100), (3, 1), (40, 30))
    for tensors in (first, second):
        for value, x in enumerate(tensors):
            x.fill_(value)
        assert all((x == value).all() for value, x in enumerate(tensors))
    assert [x.shape for x in second] == [(20, 30), (8, 100), (3, 1), (40, 30)]
    for x in second:
        (inside,) = (y for y in first if span(x)[0] in span(y))
        assert span(x)[-1] in span(inside) and (x.data_ptr() - inside.data_ptr()) % ALIGNED == 0


def test_what_does_not_fit_gets_memory_of_its_own_which_the_next_turn_has_too() -> None:
    arena = Arena()
    small, large = turn(arena, (4, 4)), turn(arena, (64, 64))
    small[0].zero_()
    large[0].fill_(1)
    assert not small[0].any()
    again = turn(arena, (64, 64))
    assert again[0].data_ptr() == large[0].data_ptr()


def test_sizes_of_prefills_are_closer_the_more_rows_there_are() -> None:
    sizes = prefill_buckets(5000)
    assert sizes[:9] == [16, 32, 64, 128, 192, 256, 384, 512, 768]
    assert sizes[9:] == [1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5000]
    assert prefill_buckets(96) == [16, 32, 64, 96] and prefill_buckets(16) == [16] and prefill_buckets(10) == [10]

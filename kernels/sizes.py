"""Sizes of launches. Triton's own functions can be called from kernels too: for that a host pays 5 to 10 us a call."""

from collections.abc import Iterable


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """At least `n`; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def holding(sizes: Iterable[int], count: int) -> int:
    """The smallest of `sizes` that so many fit into."""
    return min(size for size in sizes if size >= count)

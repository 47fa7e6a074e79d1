"""Finds the fastest tile of a case and keeps it in the room's tiles.json."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from benchmarks.kernels import KernelCase
from benchmarks.kernels.timing import microseconds
from kernels import target
from kernels.ahead import compiling_ahead

KERNELS = Path(target.__file__).parent


def compile_all(case: KernelCase, tiles: list[dict]) -> None:
    """Fill Triton's cache for these tiles. Failures show when measured."""
    with compiling_ahead(ignore_errors=True):
        for tile in tiles:
            with contextlib.suppress(Exception):
                case.make(tile)[0]()


GAIN = 0.98  # of the rule's time: what differs by less is noise, and a table of noise is worse than a rule


def tune(case: KernelCase, progress: Callable[[str], None]) -> None:
    """Measure `case.tiles()`, the best of them once more by turns with the static rule's, and keep the fastest under
    `case.tuned` if it gains."""
    assert case.tuned is not None
    tiles = [*case.tiles()]
    compile_all(case, tiles)
    found: list[tuple[float, dict]] = []
    for tile in tiles:
        try:
            us = microseconds({"tile": case.make(tile)}, rounds=3)["tile"]
        except (triton.runtime.errors.OutOfResources, triton.compiler.CompilationError, RuntimeError) as error:
            progress(f"    {tile}: {type(error).__name__} {str(error).strip()[:80]}")
            continue
        found.append((us, tile))
    found.sort(key=lambda pair: pair[0])
    for us, tile in found[:4] + found[-1:]:
        progress(f"    {us:9.2f} us  {tile}")
    if not found:
        return
    keep(case.tuned, None)
    best = {str(tile): tile for _, tile in found[:3]}
    again = microseconds({"rule": case.make(None)} | {name: case.make(tile) for name, tile in best.items()})
    fastest = min(best, key=lambda name: again[name])
    progress(f"    rule {again['rule']:.2f} us, best {again[fastest]:.2f}")
    if again[fastest] < GAIN * again["rule"]:
        keep(case.tuned, best[fastest])


def keep(where: tuple[str, str, int], tile: dict | None) -> None:
    """None: the static rule."""
    room, shape, bucket = where
    path = KERNELS / room / "tiles.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    device = table.setdefault(triton.__version__, {}).setdefault(torch.cuda.get_device_name(), {})
    buckets = device.setdefault(shape, {})
    if tile is None:
        buckets.pop(str(bucket), None)
    else:
        buckets[str(bucket)] = tile
    if not buckets:
        del device[shape]
    for entry in device.values():  # buckets in the order of their size
        ordered = sorted(entry.items(), key=lambda item: int(item[0]))
        entry.clear()
        entry.update(ordered)
    path.write_text(json.dumps(table, indent=1, sort_keys=False) + "\n")
    target._buckets.cache_clear()

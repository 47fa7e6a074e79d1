"""What a launch is compiled for: the processor's limits, and the tiles that were measured on it.

Imported by the Triton versions alone, never on the CPU path.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton

from common.errors import ConfigError

# The same processors with slower memory: without tiles of its own, a device takes the other's.
_STAND_INS = {"NVIDIA H100 80GB HBM3": "NVIDIA H200"}

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, one program after another


@dataclass(frozen=True)
class Target:
    arch: str  # sm_90, gfx950, gfx942
    device: str  # its name, as the tables of tiles know it
    processors: int  # multiprocessors: how many programs a persistent kernel starts, times its programs a processor
    shared: int  # bytes of shared memory that one program may take
    fp8: torch.dtype  # its e4m3


_LIMITS = {
    "sm_90": (132, 227 * 1024, torch.float8_e4m3fn),
    "gfx950": (256, 160 * 1024, torch.float8_e4m3fn),
    "gfx942": (304, 64 * 1024, torch.float8_e4m3fnuz),
}


def current() -> Target:
    """The target of launches from this thread. Raises ValueError for an architecture without a tile rule."""
    if INTERPRETED:
        # Few programs, so that small shapes go round the persistent loops.
        return Target("sm_90", "interpreter", 3, 227 * 1024, torch.float8_e4m3fn)
    active = triton.runtime.driver.active.get_current_target()
    return _describe(f"sm_{active.arch}" if active.backend == "cuda" else str(active.arch).split(":")[0])


def overlaps() -> bool:
    """Whether a launch may begin before the one ahead of it has ended (programmatic dependent launch)."""
    return current().arch == "sm_90" and not INTERPRETED


def overlap(on: bool) -> dict[str, bool]:
    """The option of such a launch, whose kernel waits where it must. Only NVIDIA's launches know it."""
    return {"launch_pdl": True} if on else {}


@cache
def _describe(arch: str) -> Target:
    if arch not in _LIMITS:
        raise ConfigError(f"there are no kernels for a GPU of {arch}: known are {', '.join(_LIMITS)}")
    processors, shared, fp8 = _LIMITS[arch]
    device = "none"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        device, processors = properties.name, properties.multi_processor_count
    return Target(arch, device, processors, shared, fp8)


@cache
def _buckets(source: str, shape: str, device: str) -> list[tuple[int, dict[str, int]]]:
    """(most tokens, tile), the smallest first."""
    path = Path(source).with_name("tiles.json")
    devices = json.loads(path.read_text()).get(triton.__version__, {}) if path.exists() else {}
    own, others = (devices.get(name, {}).get(shape, {}) for name in (device, _STAND_INS.get(device)))
    return sorted(((int(most), tile) for most, tile in (own or others).items()), key=lambda entry: entry[0])


def measured_tile(source: str, shape: str, tokens: int) -> dict[str, int] | None:
    """The tile that was measured best for `shape` and the bucket that holds `tokens`, or None: use the static rule.

    The tiles.json beside `source` maps Triton's version -> device -> shape (with its dtype) -> bucket -> tile; a bucket
    is named by the most tokens it holds.
    """
    fitting = (tile for most, tile in _buckets(source, shape, current().device) if most >= tokens)
    return None if (tile := next(fitting, None)) is None else dict(tile)

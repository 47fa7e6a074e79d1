"""The expert link's kernels: dispatch and combine, between two processes and within one. Not a case of the runner: it
has processes of its own.

python -m benchmarks.kernels.link [--tokens 1,16,64] [--sweep] [--tune] [--two-gpus] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.kernels import KernelCase
from benchmarks.kernels.timing import NO_GPU
from benchmarks.link_rig import Setup, Variant, in_processes, mps, time_in_one_process, time_shard, time_worker

GOAL = "<= 10 us at 64 rows under MPS"
MPS = "two, MPS"
TWO_GPUS = "0,1", "1,0"  # CUDA_VISIBLE_DEVICES of worker and shard: each its own first, and it sees the other's
SILENCE = 150.0  # seconds: longer than all compilation of a variant


def cases() -> list[KernelCase]:
    return []


def base_tile(tokens: int) -> dict[str, int]:
    """tile_rule's for the H200, without asking a GPU: this process must not open one outside MPS."""
    return {
        "programs": tokens, "warps": 4, "ticket": 0, "places": 0, "pdl": 1, "early": 1,
    }  # fmt: skip


def named_variants(tokens: int) -> dict[str, Variant]:
    """What a layer costs as launches are taken from it and ways to wait exchanged."""

    def variant(launches: int, **changes: int) -> Variant:
        return Variant(tokens, base_tile(tokens) | changes, launches)

    return {
        "3 + 2": variant(2),
        "3 + 2, tickets": variant(2, ticket=1),
        "3 + 2, late": variant(2, early=0),
        "3 + 2, no PDL": variant(2, pdl=0),
        "as with experts, 3 + 3": variant(3),
    }


def swept_variants(tokens: int) -> dict[str, Variant]:
    from kernels.link.triton import candidates

    return {str(tile): Variant(tokens, tile, 2) for tile in candidates(tokens)}


def measure(
    where: str, setup: Setup, named: dict[str, Variant], replays: int, rounds: int, gpus: Sequence[str] = ()
) -> list[dict]:
    """Prints and returns a row a variant; a side that dies or is silent ends it with a sentence."""
    variants, found = list(named.values()), []
    arguments = (setup, variants, replays, rounds)
    sides = [time_in_one_process] if where == "one process" else [time_worker, time_shard]
    try:
        for row, (name, variant) in zip(in_processes(sides, arguments, SILENCE, gpus), named.items(), strict=False):
            found.append({"where": where, "variant": name, "tokens": variant.tokens, "tile": variant.tile} | row)
            state = "" if row["ok"] and not row["wrong"] else f"FAILED: ok {row['ok']}, {row['wrong']} wrong layers"
            print(
                f"| {where} | {variant.tokens} | {name} | {row['us']:.2f} | {row['least']:.2f} | {state} |", flush=True
            )
    except RuntimeError as error:
        print(f"| {where} | | {error} | | | FAILED |", flush=True)
    return found


def keep_best(setup: Setup, rows: list[dict]) -> None:
    """The fastest tile of each count of tokens to kernels/link/tiles.json."""
    from benchmarks.kernels.tuning import keep

    layout = setup.layout
    for tokens in sorted({row["tokens"] for row in rows}):
        good = [r for r in rows if r["tokens"] == tokens and r["ok"] and not r["wrong"]]
        if good:
            keep(("link", f"{layout.hidden}x{layout.peers} fp8", tokens), min(good, key=lambda r: r["us"])["tile"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,16,64")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="one process, or two")
    parser.add_argument("--sweep", action="store_true", help="all candidate tiles, two processes only")
    parser.add_argument("--tune", action="store_true", help="sweep and write the best to kernels/link/tiles.json")
    parser.add_argument("--two-gpus", action="store_true", help="worker and shard on a GPU each, and nothing else")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.device_count():  # asks NVML where it can: need_gpu might open the GPU before MPS is there
        parser.error(NO_GPU)
    sweep, setup, rows = options.sweep or options.tune, Setup(), []
    print(f"{setup.layers} layers a graph, rows of {setup.hidden}: fp8 out, bf16 back; {time.strftime('%Y-%m-%d')}")
    print("| where | rows | variant (launches: worker + shard) | us a layer | least | |\n|---|--:|---|--:|--:|---|")
    tokens = [int(n) for n in options.tokens.split(",")]
    named = {f"{name}, {n}": v for n in tokens for name, v in (swept_variants if sweep else named_variants)(n).items()}
    if options.two_gpus:
        apart = dataclasses.replace(setup, near=False)
        rows += measure("two GPUs", apart, named, options.replays, options.rounds, TWO_GPUS)
    elif options.only != "two" and not sweep:
        rows += measure("one process", setup, named, options.replays, options.rounds)
    if options.only != "one" and not options.two_gpus:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(mps())
                rows += measure(MPS, setup, named, options.replays, options.rounds)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                print(f"no MPS, so two processes have the GPU in turns, milliseconds each: {error}", file=sys.stderr)
                rows += measure("two, no MPS", setup, dict([*named.items()][:1]), 1, 1)
    if options.tune:
        keep_best(setup, rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    where = "two GPUs" if options.two_gpus else MPS
    found = [row["us"] for row in rows if row["tokens"] == max(tokens) and row["where"] == where and row["ok"]]
    print(f"best at {max(tokens)} rows, {where}: {f'{min(found):.2f} us' if found else 'none'}; goal {GOAL}")
    return 0 if rows and all(row["ok"] and not row["wrong"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

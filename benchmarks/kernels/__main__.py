"""Every kernel at the shapes that count, against its ceiling and its peers, on one GPU in one run.

python -m benchmarks.kernels [--ops experts,linear] [--only TEXT] [--no-peers] [--check] [--json FILE]
python -m benchmarks.kernels --tune ...    sweep the tiles first and write the best to kernels/<room>/tiles.json
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
from pathlib import Path

import torch
import triton

from benchmarks.kernels import KernelCase
from benchmarks.kernels.timing import ceilings, microseconds, need_gpu
from benchmarks.kernels.tuning import tune

NOT_OPS = {"__init__", "__main__", "in_step", "timing", "tuning"}
OPS = sorted({p.stem for p in Path(__file__).parent.glob("*.py")} - NOT_OPS)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(case: KernelCase, peers: bool, check: bool) -> dict:
    """One row of the table. A side that fails says so in its place: the others count all the same."""
    row: dict = {"op": case.op, "shape": case.shape, "bytes": case.bytes, "flops": case.flops, "kind": case.kind,
                 "goal": case.goal, "failed": {}}  # fmt: skip
    sides = {"ours": lambda: case.make(None)} | (dict(case.peers) if peers else {})
    made = {}
    for name, make in sides.items():
        try:
            made[name] = make()
            microseconds({name: made[name]}, rounds=1)
        except Exception as error:
            made.pop(name, None)
            row["failed"][name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    row["us"] = microseconds(made) if made else {}
    if check and case.check is not None:
        try:
            row["error"] = case.check()
        except Exception as error:
            row["failed"]["check"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return row


def line(row: dict, ceiling: dict[str, float]) -> str:
    us = row["us"].get("ours")
    cells = [row["op"], row["shape"]]
    if us is None:
        cells += [f"failed: {row['failed'].get('ours', '')}", "", ""]
    else:
        rate, share = [], []
        if row["bytes"]:
            rate.append(f"{row['bytes'] / us / 1e6:.2f} TB/s")
            share.append((row["bytes"] / us / 1e6 / ceiling["read"], "read"))
        if row["flops"]:
            rate.append(f"{row['flops'] / us / 1e6:.0f} TFLOPS")
            share.append((row["flops"] / us / 1e6 / ceiling[row["kind"]], row["kind"]))
        best = max(share, default=(0.0, ""))
        cells += [f"{us:.1f}", ", ".join(rate), f"{best[0]:.2f} {best[1]}"]
    peers = [f"{name} {t:.1f} ({t / us:.2f}x)" for name, t in row["us"].items() if name != "ours" and us]
    cells.append("; ".join(peers))
    cells.append("" if "error" not in row else f"{row['error']:.1e}")
    cells.append(row["goal"])
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--only", default="", help="cases whose shape contains this")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--check", action="store_true", help="compare with the naive version at these shapes too")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=540.0, help="start no further case after so long")
    parser.add_argument("--json", type=Path, help="write all figures there too")
    arguments = parser.parse_args()
    ops = arguments.ops.split(",") if arguments.ops else OPS
    if unknown := set(ops) - set(OPS):
        parser.error(f"no such kernel: {', '.join(sorted(unknown))}")
    need_gpu(parser)
    started, rows = time.monotonic(), []
    ceiling = ceilings()
    head = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{time.strftime('%Y-%m-%d')}; ceilings here: read {ceiling['read']:.2f} TB/s, bf16 {ceiling['bf16']:.0f} and "
        f"fp8 {ceiling['fp8']:.0f} TFLOPS",
        f"command: python -m benchmarks.kernels {' '.join(sys.argv[1:])}",
        "",
        "| kernel | shape | us | rate | share of ceiling | peers, us (ours is faster by) | error | goal |",
        "|---|---|--:|--:|--:|---|--:|---|",
    ]
    print("\n".join(head), flush=True)
    for op in ops:
        for case in importlib.import_module(f"benchmarks.kernels.{op}").cases():
            if arguments.only not in case.shape:
                continue
            if time.monotonic() - started > arguments.seconds:
                progress(f"no time left for {case.op} {case.shape}")
                continue
            before = time.monotonic()
            if arguments.tune and case.tuned is not None:
                tune(case, progress)
            elif arguments.tune:
                progress(f"{op} {case.shape}: has no tiles to choose from")
            rows.append(run(case, not arguments.no_peers, arguments.check))
            print(line(rows[-1], ceiling), flush=True)
            progress(f"{time.monotonic() - started:6.1f} s  {op} {case.shape}: {time.monotonic() - before:.1f} s")
            gc.collect()
            if arguments.json:
                arguments.json.write_text(json.dumps({"head": head[0], "ceilings": ceiling, "rows": rows}, indent=1))
    failed = [(row, name, why) for row in rows for name, why in row["failed"].items()]
    if failed:
        print("\nNot measured:")
    for row, name, why in failed:
        print(f"- {row['op']} {row['shape']}, {name}: {why}")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.loading`: how fast a model streams from files to the device, beside reading the files alone.

What is loaded is what the one actor of a single GPU holds: the experts' stacks and all other weights. It writes
checkpoints of its own, some MoE layers of DeepSeek-V2-Lite's shape in bf16 and in fp8 as DeepSeek publishes it, and
takes turns: each as it is, and the one in bf16 with its experts quantised while they are loaded. `--cold` drops the
files from the page cache before each turn, so that the disk is what is measured.

The files of 2 layers need 5.2 GB of disk (3.2 in bf16, 2.0 in fp8), each further layer 1.8 GB more; they are removed at
the end. The device holds one of the two checkpoints at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shapes import R1, SHAPES, in_blocks
from common.checkpoint import Checkpoint
from common.errors import ConfigError
from common.model_config import ModelConfig
from common.random_weights import RandomWeights
from common.source import Progress, Read, Source
from common.transfer import CHUNK, THREADS, open_file, read_into
from common.weight_files import INDEX, weight_files
from services.expert_shard.stacks import ExpertStack, load_stacks
from services.gpu_worker.weights import Layout, Weights, load_weights

FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Way:
    name: str
    folder: Path
    experts_fp8: bool = False  # the setting of that name

    def load(self, device: str) -> tuple[dict[int, ExpertStack], Weights]:
        return load(ModelConfig.load(self.folder), Checkpoint(self.folder), device, self.experts_fp8)


def load(config: ModelConfig, source: Source, device: str, experts_fp8: bool) -> tuple[dict[int, ExpertStack], Weights]:
    """As services.colocated does, in a GPU's layout on any device."""
    fp8 = config.fp8 or experts_fp8
    stacks = load_stacks(config, source, range(config.experts), device, shared=True, fp8=fp8)
    weights = load_weights(config, source, device, layout=Layout.GPU, shared=not config.moe_layers)
    if device == "cuda":
        torch.cuda.synchronize()
    return stacks, weights


# ---- writing


class Asked(RandomWeights):
    """Notes what is asked of it, and draws nothing."""

    def __init__(self) -> None:
        super().__init__(fp8=False)
        self.tensors: dict[str, Tensor] = {}  # without values

    def fill(self, reads: Sequence[Read], progress: Progress | None = None) -> None:
        self.tensors |= {read.name: read.out.data for read in reads}


def write(folder: Path, shape: dict[str, Any], device: str, *, fp8: bool) -> None:
    folder.mkdir()
    quantization = R1["quantization_config"] if fp8 else None
    (folder / "config.json").write_text(json.dumps(shape | {"quantization_config": quantization}))
    asked, places = Asked(), dict[str, str]()
    load(replace(ModelConfig.load(folder), fp8=False), asked, "meta", False)
    wide = drawn(asked.tensors, device)
    for number, tensors in enumerate(files(in_blocks(wide) if fp8 else wide), 1):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
        print(f"written {folder.name}/{name}", flush=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def drawn(asked: dict[str, Tensor], device: str) -> Iterator[tuple[str, Tensor]]:
    source = RandomWeights(fp8=False)
    for name in sorted(asked):  # layer by layer
        out = torch.empty_like(asked[name], device=device)
        source.fill([Read(name, out)])
        yield name, out


def files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    held: dict[str, Tensor] = {}
    for name, value in tensors:
        held[name] = value.cpu()
        if sum(one.nbytes for one in held.values()) >= FILE_BYTES:
            yield held
            held = {}
    if held:
        yield held


# ---- measuring


def read_alone(folder: Path, buffers: list[bytearray]) -> None:
    """A thread a buffer, each reading as much at a time as the loading."""

    def read(place: tuple[Path, int, int]) -> None:
        path, start, size = place
        buffer = buffers.pop()
        read_into(memoryview(buffer)[:size], opened[path], path, start)
        buffers.append(buffer)

    sizes = {path: path.stat().st_size for path in weight_files(folder)}
    places = [(path, at, min(CHUNK, size - at)) for path, size in sizes.items() for at in range(0, size, CHUNK)]
    with ExitStack() as stack, ThreadPoolExecutor(len(buffers)) as pool:
        opened = {path: open_file(path, stack) for path in sizes}
        list(pool.map(read, places))


def forget(folder: Path) -> None:
    for path in weight_files(folder):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # an actor that starts has to ask the driver for its memory too
    start = time.perf_counter()
    held = run()
    took = time.perf_counter() - start
    del held  # what frees it is not what is measured
    return took


def measure(ways: Sequence[Way], device: str, turns: int, cold: bool) -> Iterator[str]:
    """A row of the table for each way; of one that cannot be loaded it says why."""
    buffers = [bytearray(CHUNK) for _ in range(THREADS if device == "cuda" else 1)]
    failed: dict[Way, str] = {}
    for way in ways:  # pins memory, makes streams, fills the page cache
        print(f"first, untimed: {way.name}", flush=True)
        read_alone(way.folder, buffers)
        try:
            way.load(device)
        except ConfigError as error:
            failed[way] = str(error)  # the error itself would hold what had been loaded
    sizes = {way: sum(path.stat().st_size for path in weight_files(way.folder)) / 1e9 for way in ways}
    speeds: dict[tuple[Way, str], list[float]] = defaultdict(list)
    for turn in range(turns):
        for way in [way for way in ways if way not in failed]:
            reading, loading = partial(read_alone, way.folder, buffers), partial(way.load, device)
            for what, run in (("read alone", reading), ("loaded", loading)):
                if cold:
                    forget(way.folder)
                speed = sizes[way] / seconds(run)
                speeds[way, what].append(speed)
                print(f"turn {turn + 1} of {turns}: {way.name}, {what}: {speed:.3g} GB/s", flush=True)
    for way in ways:
        row = f"| {way.name} | {sizes[way]:.3g} |"
        if way in failed:
            yield f"{row} | | {failed[way]} |"
        else:
            alone, loaded = (statistics.median(speeds[way, what]) for what in ("read alone", "loaded"))
            yield f"{row} {alone:.3g} | {loaded:.3g} | {loaded / alone:.0%} |"


def shape_of(text: str) -> dict[str, Any]:
    if text in SHAPES:
        return SHAPES[text]
    try:
        return json.loads((Path(text) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither of {', '.join(SHAPES)} nor a model: {error}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=shape_of, default="v2-lite", help="or r1, or a model's folder, as models/tiny (default v2-lite)"
    )
    parser.add_argument("--layers", type=int, default=2, help="all of them MoE layers (default %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--folder", help="where to write, for another disk than the temporary files'")
    parser.add_argument("--cold", action="store_true", help="with nothing of the files in memory")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Without V2-Lite's dense layer, whose width no blocks of 128 divide.
    shape = options.shape | {"num_hidden_layers": options.layers, "first_k_dense_replace": 0}
    with tempfile.TemporaryDirectory(prefix="moecule-load-", dir=options.folder) as name:
        bf16, fp8 = Path(name) / "bf16", Path(name) / "fp8"
        write(bf16, shape, device, fp8=False)
        write(fp8, shape, device, fp8=True)
        os.sync()
        ways = [Way("bf16", bf16), Way("fp8", fp8), Way("bf16, experts to fp8", bf16, experts_fp8=True)]
        rows = list(measure(ways, device, options.turns, options.cold))
    print(
        f"| {'cold' if options.cold else 'warm'}, to {device} | GB of files | GB/s read alone | GB/s loaded | ratio |"
    )
    print("|---|--:|--:|--:|--:|", *rows, sep="\n")


if __name__ == "__main__":
    main()

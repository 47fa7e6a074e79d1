"""`python -m benchmarks.loading`: how fast experts stream from files to the device, beside reading the files alone.

It writes a checkpoint of its own, the size of some layers of DeepSeek-V2-Lite's experts, and takes turns. `--cold`
drops the files from the page cache before each turn, so that the disk is what is measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.checkpoint import Checkpoint
from common.source import Read
from common.transfer import CHUNK, THREADS

ROWS, COLUMNS = 1408, 2048
EACH = 64 * 3  # matrices a file


def write(folder: Path, files: int) -> None:
    values = torch.randint(-(1 << 15), 1 << 15, (ROWS, COLUMNS), dtype=torch.int16).view(torch.bfloat16)
    for file in range(files):
        save_file({f"{file}.{i}": values.clone() for i in range(EACH)}, folder / f"{file}.safetensors")
        print(f"written {file + 1} of {files} files", flush=True)
    os.sync()


def read_alone(folder: Path) -> None:
    """With as many threads and of the same size as the loading reads."""

    def read(place: tuple[Path, int]) -> None:
        with open(place[0], "rb", buffering=0) as file:
            view, got = memoryview(buffers.pop()), 0
            file.seek(place[1])
            while got < CHUNK and (count := file.readinto(view[got:])):
                got += count
            buffers.append(view.obj)  # type: ignore[arg-type]

    buffers = [bytearray(CHUNK) for _ in range(THREADS)]
    paths = sorted(folder.glob("*.safetensors"))
    places = [(path, start) for path in paths for start in range(0, path.stat().st_size, CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, places))


def load(folder: Path, device: str) -> None:
    checkpoint = Checkpoint(folder)
    names = list(checkpoint.names())
    stack = torch.empty(len(names), ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    checkpoint.fill([Read(name, out) for name, out in zip(names, stack, strict=True)])


def forget(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=4, help="of 1.1 GB")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", help="where to write, for another disk than the temporary files'")
    parser.add_argument("--cold", action="store_true", help="with nothing of the files in memory")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="moecule-load-", dir=options.folder) as name:
        folder = Path(name)
        write(folder, options.files)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
        ways = {"read alone": lambda: read_alone(folder), f"load to {device}": lambda: load(folder, device)}
        for run in ways.values():
            run()  # pins memory, makes streams
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(options.turns):
            for way, run in ways.items():
                if options.cold:
                    forget(folder)
                speeds[way].append(size / seconds(run))
                print(f"turn {turn + 1} of {options.turns}: {way} {speeds[way][-1]:.2f} GB/s", flush=True)
    alone, loaded = (statistics.median(each) for each in speeds.values())
    print(f"median: {alone:.2f} GB/s read alone, {loaded:.2f} GB/s to {device}: {loaded / alone:.0%}")


if __name__ == "__main__":
    main()

"""Weights to a GPU hold what the same loading gives on a CPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.checkpoint import Checkpoint
from common.random_weights import RandomWeights
from common.source import CODED, Progress, Read, empty
from kernels.quant import Fp8Blocks, quantise_blocks

pytestmark = pytest.mark.gpu

ROWS, COLUMNS = 4352, 2200  # more than a chunk in any dtype but 8 bits
WIDE = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("weights")
    for file in range(2):
        tensors: dict[str, Tensor] = {}
        for i in range(6):
            value = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(10 * file + i))
            blocks = quantise_blocks(value)
            tensors |= {f"{file}.{i}": value.to(WIDE[i % 3]), f"{file}.{i}.bias": value[:, 0].to(WIDE[i % 3]).clone()}
            tensors |= {f"{file}.{i}.coded": blocks.data, f"{file}.{i}.coded_scale_inv": blocks.scale}
        save_file(tensors, folder / f"{file}.safetensors")
    return Checkpoint(folder)


def fill(
    checkpoint: Checkpoint, device: str, *, fp8: bool, progress: Progress | None = None
) -> dict[str, list[Tensor]]:
    """Everything, matrices in blocks of 8 bits or in bf16: converted wherever the file has it otherwise."""
    reads = []
    for name in checkpoint.names():
        if name.endswith("bias"):
            reads.append(Read(name, torch.empty(ROWS, device=device)))
        elif not name.endswith("scale_inv"):
            reads.append(Read(name, empty((ROWS, COLUMNS), torch.bfloat16, device, fp8=fp8)))
    checkpoint.fill(reads, progress)
    return {r.name: [r.out.data, r.out.scale] if isinstance(r.out, Fp8Blocks) else [r.out] for r in reads}


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_files_reach_the_gpu_whole(checkpoint: Checkpoint, fp8: bool) -> None:
    told: list[tuple[int, int]] = []
    got = fill(checkpoint, "cuda", fp8=fp8, progress=lambda *seen: told.append(seen))
    want = fill(checkpoint, "cpu", fp8=fp8)
    for name, tensors in want.items():
        for on_gpu, on_cpu in zip(got[name], tensors, strict=True):
            assert on_gpu.is_cuda and torch.equal(on_gpu.cpu().float(), on_cpu.float()), name
    assert told == sorted(told) and told[-1][0] == told[-1][1]


def test_memory_that_is_still_in_use_is_not_overwritten(checkpoint: Checkpoint) -> None:
    """The allocator may hand out what an unfinished kernel of the caller's stream still reads."""
    sums = []
    for _ in range(20):
        used = torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16, device="cuda")
        torch.cuda._sleep(20_000_000)
        sums.append(used.float().sum())
        del used
        checkpoint.fill([Read("0.0", torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device="cuda"))])
    assert [value.item() for value in sums] == [ROWS * COLUMNS] * 20


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_chance_on_a_gpu_is_reproducible(fp8: bool) -> None:
    first, second = (empty((ROWS, COLUMNS), torch.bfloat16, "cuda", fp8=fp8) for _ in range(2))
    for out in (first, second):
        RandomWeights(fp8=fp8).fill([Read("model.layers.0.mlp.down_proj.weight", out)])
    assert torch.equal(first.data.float(), second.data.float()) and first.data.dtype is (
        CODED if fp8 else torch.bfloat16
    )
    if isinstance(first, Tensor):
        assert first.float().std().item() == pytest.approx(0.02, rel=0.01)

"""Launches in graphs, where those of a decode step overlap, give bitwise what the same launches give one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.shapes import write_config
from common.model_config import ModelConfig
from common.pages import PAGE
from common.source import open_source
from services.expert_shard.stacks import load_stacks
from services.gpu_worker.weights import load_weights
from tests.kernel_checks import error_ratio

pytestmark = pytest.mark.gpu

MOST, CONTEXT = 64, 1500
STEPS = 40  # of each bucket, every one with tokens and contexts of its own


@contextmanager
def one_by_one() -> Iterator[None]:
    """Triton's launches: each has ended before the next is made."""
    import triton

    launch = triton.JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        launched = launch(self, *args, **options)
        torch.cuda.synchronize()
        return launched

    triton.JITFunction.run = run
    try:
        yield
    finally:
        triton.JITFunction.run = launch


@pytest.fixture(scope="module", params=["v2-lite", "r1"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Full widths, so that launches compete for the processors, and two sparse layers."""
    from services.gpu_worker.graphs import GpuRunner
    from services.gpu_worker.model import Model
    from services.gpu_worker.sampler import Sampler

    layers = {"v2-lite": 3, "r1": 5}[request.param]
    folder = write_config(request.param, layers, tmp_path_factory.mktemp("shape"))
    config = ModelConfig.load(folder, weights="random")
    source = open_source(folder, config, "random")
    with torch.inference_mode():
        stacks = load_stacks(config, source, range(config.experts), "cuda", shared=True, fp8=config.fp8)
        model = Model(config, load_weights(config, source, "cuda", shared=False), stacks=stacks)
        cache = model.new_cache(MOST * -(-CONTEXT // PAGE))
        for pages in cache:
            pages.normal_()
        sampler = Sampler(config, max_batch=MOST, threads=1, device="cuda")
        yield GpuRunner(model, cache, sampler, max_batch=MOST, max_context=CONTEXT)
    del model, cache, stacks, sampler
    torch.cuda.empty_cache()


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 24, 64])
def test_a_step_is_the_same_as_its_launches_one_by_one(runner: Any, rows: int) -> None:
    torch.manual_seed(rows)
    runner._blank(MOST)
    step, given, table = runner._prepare(rows), runner._inputs.on_device, runner._table.on_device
    table.copy_(torch.randperm(table.numel(), device="cuda").view_as(table))
    with torch.inference_mode():
        graph = runner._graph(step.forward)
        for number in range(STEPS):
            context = torch.randint(1, CONTEXT, (rows,), device="cuda")
            given["tokens"][:rows] = torch.randint(runner._model.config.vocab, (rows,), device="cuda")
            given["context"][:rows], given["positions"][:rows] = context, context - 1
            page = table[:rows].gather(1, ((context - 1) // PAGE)[:, None])[:, 0]
            given["write"][:rows] = page * PAGE + (context - 1) % PAGE
            with one_by_one():
                step.forward()
            want = step.logits.clone()
            for _ in range(3):
                step.logits.fill_(torch.nan)
                graph.replay()
                assert torch.equal(step.logits, want), f"step {number}: {(step.logits != want).sum()} logits differ"


@pytest.mark.parametrize(
    "prompts",  # (rows, context once they are written)
    [
        [(2048, 2048)], [(10, 1500)], [(128, 828)], [(200, 900)], [(1536, 1536)],
        [(700, 1400), (2, 2), (500, 1200), (798, 1500)],  # together more than the scratch has room for
    ],
    ids=str,
)  # fmt: skip
def test_a_prefill_in_graphs_is_the_same_as_launch_by_launch(runner: Any, prompts: list[tuple[int, int]]) -> None:
    from services.gpu_worker.batch import Batch, Chunk
    from services.gpu_worker.graphs import prefill_buckets, to_gpu

    if not runner._prefills:
        runner._pool = None  # that of the other test's graphs, which are gone
        runner.capture(2048)
    rows = sum(rows for rows, _ in prompts)
    torch.manual_seed(rows)
    model, cache = runner._model, runner._cache
    bucket = min(size for size in prefill_buckets(2048) if size >= rows)

    def padded(column: torch.Tensor, padding: int) -> torch.Tensor:
        return torch.nn.functional.pad(column, (0, bucket - rows), value=padding)

    for turn in range(3):  # the same graphs, other tokens and pages
        free, first = torch.randperm(len(cache[0])), 0
        chunks, positions, write = list[Chunk](), list[torch.Tensor](), list[torch.Tensor]()
        for count, context in prompts:
            pages, free = free.split([-(-context // PAGE), len(free) + -context // PAGE])
            at = torch.arange(context - count, context)
            chunks.append(Chunk(first, count, context, pages))
            positions.append(at)
            write.append(pages[at // PAGE] * PAGE + at % PAGE)
            first += count
        batch = Batch(
            tokens=torch.randint(model.config.vocab, (rows,)),
            positions=torch.cat(positions),
            write=torch.cat(write),
            n_decode=0,
            block_table=torch.zeros(0, 0, dtype=torch.int32),
            context=torch.zeros(0, dtype=torch.int32),
            prefill=tuple(chunks),
            logit_rows=torch.tensor([rows - 1]),
        )
        whole = replace(
            batch, tokens=padded(batch.tokens, 0), positions=padded(batch.positions, 0), write=padded(batch.write, -1)
        )

        def one_after_another(work: Any, batch: Batch = batch, whole: Batch = whole, **given: Any) -> torch.Tensor:
            work.out.zero_()
            attend = model.attention(batch, cache, work, **given)
            with one_by_one():
                for layer in model.around_attention(to_gpu(whole), cache, work):
                    attend(layer)
            return work.x[:rows].clone()

        with torch.inference_mode():
            work = model.new_work(bucket, context=8192)
            want, together = one_after_another(work, scratch=runner._scratch), one_after_another(work)
            runner._turn = turn % 2
            assert torch.equal(runner._pass(batch), want)
            assert error_ratio(together, want) < 1e-2

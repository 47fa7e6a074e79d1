"""The parts of a worker on a GPU put together, and how large its KV cache may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog
import torch
from structlog.typing import FilteringBoundLogger

from common.model_config import ModelConfig
from common.pages import PAGE
from kernels.ahead import compiling_ahead
from services.gpu_worker.engine import Engine, StepOutput
from services.gpu_worker.graphs import GpuRunner, StepLinks, blank_prefill, buckets, prefill_buckets, to_gpu
from services.gpu_worker.model import Model, Stack
from services.gpu_worker.pace import Pace
from services.gpu_worker.pages import PageAllocator
from services.gpu_worker.planner import Planner
from services.gpu_worker.sampler import Sampler
from services.gpu_worker.weights import Weights

GRAPHS = 256 << 20  # bytes that a captured bucket's scratch may take, beside what the largest one shares with it
PIECE = 1 << 20  # bytes that the driver takes for one of a prefill's graphs


def make_engine(
    config: ModelConfig,
    weights: Weights,
    stacks: Mapping[int, Stack] | None,
    emit: Callable[[StepOutput], None],
    *,
    max_batch: int,
    max_context: int,
    chunk_tokens: int,
    prefix_cache: bool,
    pages: int = 0,
    fp8_cache: bool = False,
    memory: float = 0.92,
    itl: float = 0.0,
    links: StepLinks | None = None,
    log: FilteringBoundLogger | None = None,
) -> Engine:
    """With the routed experts in this process, as `stacks`, or behind `links`. `pages`: of the KV cache; 0: what is
    left of `memory`, the share of the GPU that this process may take, less what its shards may set aside on it. `itl`:
    seconds, of Pace."""
    log = log or structlog.get_logger()
    torch.set_grad_enabled(False)
    model = Model(config, weights, stacks=stacks, device_link=links.device if links else None)
    sampler = Sampler(config, max_batch=max_batch, threads=1, device="cuda")
    compile_kernels(model.abridged(), sampler, max_batch, max_context, chunk_tokens, fp8_cache=fp8_cache, links=links)
    log.info("kernels compiled")
    if not pages:
        pages = cache_pages(model, max_batch, chunk_tokens, max_context, fp8_cache, memory)
    log.info("KV cache", pages=pages, tokens=pages * PAGE)
    if pages * PAGE < max_context:
        log.warning(
            "the KV cache is smaller than a request may be: a higher MOECULE_GPU_MEMORY, MOECULE_KV_CACHE=fp8 or a "
            "lower MOECULE_MAX_CONTEXT mends that", tokens=pages * PAGE, context=max_context,
        )  # fmt: skip
    cache = model.new_cache(pages, fp8_cache)
    runner = GpuRunner(
        model, cache, sampler, max_batch=max_batch, max_context=max_context, fp8_cache=fp8_cache, links=links
    )
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    runner.capture(chunk_tokens)
    taken = round((free - torch.cuda.mem_get_info()[0]) / 1e9, 2)  # other processes' too, where they share the GPU
    log.info("graphs", decodes=sorted(runner.graphs), prefills=prefill_buckets(chunk_tokens), gb=taken)
    pace = Pace(chunk_tokens, itl, prefill_buckets(chunk_tokens))
    if itl and links is None:  # no shard answers yet: what theirs cost is learned from steps
        pace.rehearse(runner.time_decodes, runner.time_prefill, max_context)
    planner = Planner(
        PageAllocator(pages), config.fingerprint, max_batch=max_batch, pace=pace, prefix_cache=prefix_cache
    )
    return Engine(config, runner, planner, sampler, emit, log)


def compile_kernels(
    model: Model, sampler: Sampler, max_batch: int, max_context: int, chunk_tokens: int, *, fp8_cache: bool,
    links: StepLinks | None,
) -> None:  # fmt: skip
    """Those that serving is known to need. Passes of prompts have the sizes of their graphs; what has others, attention
    and logits, launches the same kernels (tests/worker_kinds.py)."""
    runner = GpuRunner(
        model, model.new_cache(1, fp8_cache), sampler, max_batch=max_batch, max_context=max_context,
        fp8_cache=fp8_cache, links=links,
    )  # fmt: skip
    with compiling_ahead():
        runner.compile()
        sampler.rehearse(model.dtype)
        rehearse_prefill(model, chunk_tokens, max_context, fp8_cache)
        for rows in prefill_buckets(chunk_tokens):
            rehearse_prefill(model, rows, rows, fp8_cache)


def cache_pages(
    model: Model, max_batch: int, chunk_tokens: int, max_context: int, fp8_cache: bool, memory: float
) -> int:
    """What remains after the largest prefill, measured, and an allowance for the graphs, which are captured with the
    cache in place."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rehearse_prefill(model, chunk_tokens, max_context, fp8_cache)
    needed = torch.cuda.max_memory_allocated() - before + len(buckets(max_batch)) * GRAPHS // 8 + GRAPHS
    needed += len(prefill_buckets(chunk_tokens)) * (model.config.layers + 1) * PIECE
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    if model.device_link is not None:
        layout = model.device_link.layout
        needed += layout.bytes() - layout.reply_bytes()
    room = int(free - (1 - memory) * total - needed)
    c = model.config
    page = c.layers * PAGE * (c.latent * model.dtype.itemsize)
    if fp8_cache:
        from kernels.latent_cache import page_bytes

        page = c.layers * page_bytes(c.kv_lora, c.rope)
    most = max_batch * -(-max_context // PAGE)
    return max(16, min(room // page, most))


def rehearse_prefill(model: Model, rows: int, context: int, fp8_cache: bool) -> None:
    """A pass of so many rows that ends a prompt of `context` tokens: it compiles the kernels, and with the largest
    numbers it takes the most memory that a step may take."""
    context = max(rows, context)
    batch = to_gpu(blank_prefill(rows, context, model.config.vocab))
    work = model.new_work(rows, context=1 << max(context - 1, 1).bit_length())
    model.logits(model.hidden(batch, model.new_cache(1, fp8_cache), work), batch.logit_rows)
    torch.cuda.synchronize()

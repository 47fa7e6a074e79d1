"""Steps on a GPU: decodes as a CUDA graph a bucket of rows, then the step's prefill, launched one by one.

The host never waits for a step before it launches the next: a token that it has not seen yet is named by the row of the
step before that samples it. All launches are on one stream, so a page may have a new owner while an older step that
names it is under way: the newer one's writes come later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.device import capturing
from common.messages import TokenLogprobs
from common.pages import PAGE
from common.pinned import to_device, to_host
from kernels.sample import Logprobs, SampleParams
from services.gpu_worker.batch import Batch, Feed
from services.gpu_worker.device_link import IN_FLIGHT, DeviceLink
from services.gpu_worker.model import Cache, Model
from services.gpu_worker.planner import UNKNOWN, Chunk, Plan, Sequence
from services.gpu_worker.runner import Computed, StepFailed
from services.gpu_worker.sampler import Sampled, Sampler, int64, logprobs_of
from services.gpu_worker.scoring import Scoring, score_prompts
from services.gpu_worker.step import build_batch
from services.gpu_worker.work import Work


def buckets(most: int) -> list[int]:
    """The numbers of rows that decode graphs are captured for: padding costs a sixth at most from 16 rows on."""
    small = [n for n in (1, 2, 4, 8, 12) if n < most]
    steps = [n for n in range(16, most, 8 if most <= 128 else 16)]
    return [*small, *steps, most]


class StepLinks(Protocol):
    """The expert links of a worker as its runner uses them, on the engine's thread and stream."""

    @property
    def device(self) -> DeviceLink: ...

    def begin_step(self) -> None:
        """Before anything of a step is launched. Raises ExpertsUnavailable; then there is no step."""
        ...

    def ring(self, rows: int, prefill: bool) -> None:
        """Before a pass is launched: the shards launch theirs."""
        ...

    def end_step(self, ok: bool) -> None:
        """The oldest step has ended; nothing of it runs any more."""
        ...


class Inputs:
    """What the host tells a decode graph: one pinned block a step in flight, copied to the device in one go."""

    _WIDE = ("tokens", "positions", "write", "top_k", "seed", "at")  # int64
    _REAL = ("temperature", "top_p", "min_p")  # float32
    _NARROW = ("source", "context")  # int32

    def __init__(self, rows: int) -> None:
        size = rows * (8 * len(self._WIDE) + 4 * len(self._REAL) + 4 * len(self._NARROW))
        self._device = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self._host = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(IN_FLIGHT)]
        self.on_device = self._views(self._device, rows)
        self.on_host: list[dict[str, NDArray[Any]]] = [
            {name: part.numpy() for name, part in self._views(host, rows).items()} for host in self._host
        ]

    def _views(self, block: Tensor, rows: int) -> dict[str, Tensor]:
        views, at = {}, 0
        kinds = ((self._WIDE, torch.int64), (self._REAL, torch.float32), (self._NARROW, torch.int32))
        for names, dtype in kinds:
            for name in names:
                end = at + rows * dtype.itemsize
                views[name], at = block[at:end].view(dtype), end
        return views

    def send(self, turn: int) -> None:
        self._device.copy_(self._host[turn], non_blocking=True)


class BlockTable:
    """The pages of each decode row, on the device; a row is sent when it changes."""

    def __init__(self, rows: int, pages: int) -> None:
        self.on_device = torch.zeros(rows, pages, dtype=torch.int32, device="cuda")
        self._host = [torch.zeros(rows, pages, dtype=torch.int32, pin_memory=True) for _ in range(IN_FLIGHT)]
        self._rows: list[tuple[Sequence, int, int] | None] = [None] * rows

    def set(self, turn: int, row: int, sequence: Sequence) -> None:
        now = sequence, sequence.preemptions, len(sequence.pages)
        if self._rows[row] != now:
            self._rows[row] = now
            host = self._host[turn][row, : len(sequence.pages)]
            host.copy_(torch.tensor(sequence.pages, dtype=torch.int32))
            self.on_device[row, : len(host)].copy_(host, non_blocking=True)


@dataclass(frozen=True)
class Prepared:
    """A bucket's launches before they are captured."""

    work: Work
    logits: Tensor  # [rows, vocab]
    forward: Callable[[], None]
    greedy: Callable[[], None]
    random: Callable[[], None]


@dataclass(frozen=True)
class DecodeGraph:
    """One bucket's. `sample` is captured twice: all greedy, and not."""

    forward: torch.cuda.CUDAGraph
    greedy: torch.cuda.CUDAGraph
    random: torch.cuda.CUDAGraph
    logits: Tensor  # [bucket, vocab]
    hidden: Tensor  # [bucket, hidden]


@dataclass(frozen=True)
class UnderWay:
    """A launched step: where its results will be."""

    samples: tuple[Sequence, ...]
    rows: list[int]  # of `tokens`, one for each of `samples`
    tokens: Tensor  # int64, pinned
    logs: list[tuple[tuple[Sequence, ...], Logprobs]]  # what these asked for
    scored: list[Scoring]
    ok: Tensor  # int32 [1], pinned: 0 if a shard did not answer
    began: torch.cuda.Event
    done: torch.cuda.Event


class GpuRunner:
    overlaps = True

    def __init__(
        self, model: Model, cache: Cache, sampler: Sampler, *, max_batch: int, max_context: int,
        fp8_cache: bool = False, links: StepLinks | None = None,
    ) -> None:  # fmt: skip
        self._model, self._cache, self._sampler, self._fp8_cache = model, cache, sampler, fp8_cache
        self._links = links
        self._oks = [torch.ones(1, dtype=torch.int32, pin_memory=True) for _ in range(IN_FLIGHT)]
        self._max_batch = max_batch
        self._inputs = Inputs(max_batch)
        self._table = BlockTable(max_batch, -(-max_context // PAGE))
        # Of decode rows, then of the step's prompts that end.
        self._sampled = torch.zeros(2 * max_batch, dtype=torch.int64, device="cuda")
        self._results = [torch.zeros(2 * max_batch, dtype=torch.int64, pin_memory=True) for _ in range(IN_FLIGHT)]
        self._row_of: dict[Sequence, int] = {}  # whose last token the step before samples: where in `_sampled`
        self._turn = 0
        self._works: dict[tuple[int, int], Work] = {}  # of prefills
        self.works: dict[int, Work] = {}  # of the decode graphs
        self.graphs: dict[int, DecodeGraph] = {}
        self._pool: Any = None

    def compile(self) -> None:
        """Within kernels.ahead: every launch of the decode graphs."""
        for rows in buckets(self._max_batch):
            one = self._prepare(rows)
            with torch.inference_mode():
                for launch in (one.forward, one.greedy, one.random):
                    launch()

    def capture(self) -> None:
        """All decode graphs, the largest first: the smaller ones' scratch lies in what it took."""
        self._blank(self._max_batch)
        for rows in reversed(buckets(self._max_batch)):
            one = self._prepare(rows)
            self.works[rows] = one.work
            forward, greedy, random = (self._graph(launch) for launch in (one.forward, one.greedy, one.random))
            self.graphs[rows] = DecodeGraph(forward, greedy, random, one.logits, one.work.x)
        torch.cuda.synchronize()

    def time_decodes(self) -> float:
        """Seconds that the largest decode graph takes once it has run, with nothing in the cache."""
        self._blank(self._max_batch)
        graph, seconds = self.graphs[self._max_batch], 0.0
        for _ in range(2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            graph.forward.replay()
            graph.greedy.replay()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        return seconds

    def bucket(self, rows: int) -> int:
        """The size of the graph that takes so many decodes."""
        return min(size for size in self.graphs if size >= rows)

    # ---- a step

    def launch(self, plan: Plan) -> UnderWay:
        if self._links is not None:
            self._links.begin_step()
        self._turn = (self._turn + 1) % IN_FLIGHT
        began = torch.cuda.Event(enable_timing=True)
        began.record()
        sampled, scored = plan.sampled, list[Scoring]()
        logs: list[tuple[tuple[Sequence, ...], Logprobs]] = []
        decoding = tuple(c.sequence for c in plan.decodes)
        prompts = tuple(c.sequence for c in plan.prefills if c.sequence in sampled)
        row_of = {s: row for row, s in enumerate(decoding)}
        row_of |= {s: self._max_batch + i for i, s in enumerate(prompts)}
        if decoding:
            found, hidden = self._decode(plan.decodes, decoding)
            logs += _on_the_way(decoding, found)
            scored += score_prompts(self._model, Plan(plan.decodes, ()), hidden)
        if plan.prefills:
            found, hidden = self._prefill(plan.prefills, prompts)
            logs += _on_the_way(prompts, found)
            scored += score_prompts(self._model, Plan((), plan.prefills), hidden)
        self._row_of = row_of
        rows = [row_of[sequence] for sequence in sampled]
        host = self._results[self._turn]
        host.copy_(self._sampled, non_blocking=True)
        ok = self._oks[self._turn]
        if self._links is not None:
            ok.copy_(self._links.device.peers.ok, non_blocking=True)
        done = torch.cuda.Event(blocking=True, enable_timing=True)
        done.record()
        return UnderWay(sampled, rows, host, logs, scored, ok, began, done)

    def finish(self, launched: UnderWay) -> Computed:
        if not self._ended(launched):
            raise StepFailed("an expert shard did not answer")
        tokens, place = launched.tokens.tolist(), {s: i for i, s in enumerate(launched.samples)}
        logprobs: dict[int, TokenLogprobs] = {}
        for sequences, logs in launched.logs:
            told = logprobs_of(sequences, logs)
            logprobs |= {place[s]: told[row] for row, s in enumerate(sequences) if row in told and s in place}
        seconds = launched.began.elapsed_time(launched.done) / 1e3
        scored = [scoring.read() for scoring in launched.scored]
        return Computed(Sampled([tokens[row] for row in launched.rows], logprobs), scored, seconds)

    def discard(self, launched: UnderWay) -> None:
        self._ended(launched)

    def _ended(self, launched: UnderWay) -> bool:
        launched.done.synchronize()
        ok = bool(launched.ok[0])
        if self._links is not None:
            self._links.end_step(ok)
        return ok

    # ---- decodes

    def _decode(self, chunks: tuple[Chunk, ...], sequences: tuple[Sequence, ...]) -> tuple[Logprobs | None, Tensor]:
        count = len(chunks)
        bucket = self.bucket(count)
        self._tell(chunks, bucket)
        graph, mask = self.graphs[bucket], self._sampler.begin(sequences)
        if self._links is not None:
            self._links.ring(bucket, prefill=False)
        graph.forward.replay()
        if self._sampler.plain(sequences):
            random = any(s.request.sampling.temperature > 0 for s in sequences)
            (graph.random if random else graph.greedy).replay()
            return None, graph.hidden
        logits, out = graph.logits[:count], self._sampled[:count]
        return self._sampler.sample(sequences, logits, out, mask), graph.hidden

    def _tell(self, chunks: tuple[Chunk, ...], bucket: int) -> None:
        host, turn = self._inputs.on_host[self._turn], self._turn
        tokens, source, write = [], [], []
        for row, chunk in enumerate(chunks):
            sequence, at = chunk.sequence, chunk.start
            token = sequence.tokens[at]
            tokens.append(max(token, 0))
            source.append(self._row_of[sequence] if token == UNKNOWN else -1)
            write.append(sequence.pages[at // PAGE] * PAGE + at % PAGE)
            self._table.set(turn, row, sequence)
        asked = [c.sequence.request.sampling for c in chunks]
        values: dict[str, tuple[list, Any]] = {
            "tokens": (tokens, 0),
            "positions": ([c.start for c in chunks], 0),
            "write": (write, -1),
            "source": (source, -1),
            "context": ([c.end for c in chunks], 0),
            "temperature": ([s.temperature for s in asked], 0.0),
            "top_p": ([s.top_p for s in asked], 1.0),
            "min_p": ([s.min_p for s in asked], 0.0),
            "top_k": ([s.top_k for s in asked], 0),
            "seed": ([int64(s.seed) for s in asked], 0),
            "at": ([c.end for c in chunks], 0),
        }
        for name, (column, padding) in values.items():
            host[name][: len(column)] = column
            host[name][len(column) : bucket] = padding
        self._inputs.send(turn)

    def _prepare(self, rows: int) -> Prepared:
        given, work = self._inputs.on_device, self._model.new_work(rows, decodes=rows, fp8_cache=self._fp8_cache)
        batch = Batch(
            tokens=given["tokens"][:rows],
            positions=given["positions"][:rows],
            write=given["write"][:rows],
            n_decode=rows,
            block_table=self._table.on_device[:rows],
            context=given["context"][:rows],
            prefill=(),
            logit_rows=given["tokens"][:0],
            feed=Feed(given["source"][:rows], self._sampled),
        )
        logits = torch.empty(rows, self._model.config.vocab, dtype=self._model.dtype, device="cuda")
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "at")
        params = SampleParams(*(given[name][:rows] for name in names))
        out = self._sampled[:rows]

        def forward() -> None:
            self._model.logits(self._model.hidden(batch, self._cache, work), out=logits)

        return Prepared(
            work,
            logits,
            forward,
            greedy=lambda: self._sampler.launch(logits, None, out),
            random=lambda: self._sampler.launch(logits, params, out),
        )

    def _blank(self, rows: int) -> None:
        """Inputs of which no row is real: for runs whose results nobody wants. Their tokens differ, as real ones' do:
        so they choose as many experts."""
        host, tokens = self._inputs.on_host[0], np.arange(rows) % self._model.config.vocab
        blank = {"write": -1, "source": -1, "context": 0, "tokens": tokens, "positions": 0, "top_p": 1}
        for name, value in blank.items():
            host[name][:rows] = value
        self._inputs.send(0)

    def _graph(self, launch: Any) -> torch.cuda.CUDAGraph:
        launch()  # libraries choose and allocate here, on the stream's own account
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, pool=self._pool):
            launch()
        self._pool = graph.pool()
        return graph

    # ---- prefill

    def _prefill(self, chunks: tuple[Chunk, ...], prompts: tuple[Sequence, ...]) -> tuple[Logprobs | None, Tensor]:
        plan = Plan((), chunks)
        batch = _to_gpu(build_batch(plan))
        context = sum(chunk.end for chunk in chunks)
        model, mask = self._model, self._sampler.begin(prompts)
        work = self._work(len(batch.tokens), context)
        if self._links is not None:
            self._links.ring(len(batch.tokens), prefill=True)
        hidden = model.hidden(batch, self._cache, work)
        if not prompts:
            return None, hidden
        logits = model.logits(hidden, batch.logit_rows)
        out = self._sampled[self._max_batch : self._max_batch + len(prompts)]
        return self._sampler.sample(prompts, logits, out, mask), hidden

    def _work(self, rows: int, context: int) -> Work:
        """Of the last shape: chunks are mostly of one size."""
        room = 1 << max(context - 1, 1).bit_length()
        if (rows, room) not in self._works:
            self._works.clear()
            self._works[rows, room] = self._model.new_work(rows, context=room)
        return self._works[rows, room]


def _on_the_way(sequences: tuple[Sequence, ...], found: Logprobs | None) -> list[tuple[tuple[Sequence, ...], Logprobs]]:
    """To the host: read where they are, they would wait for the step behind this one."""
    if found is None:
        return []
    return [(sequences, Logprobs(*map(to_host, (found.wanted, found.chosen, found.ids, found.values))))]


def _to_gpu(batch: Batch) -> Batch:
    def there(x: Tensor) -> Tensor:
        return to_device(x, "cuda")

    return Batch(
        tokens=there(batch.tokens),
        positions=there(batch.positions),
        write=there(batch.write),
        n_decode=0,
        block_table=there(batch.block_table.int()),
        context=there(batch.context.int()),
        prefill=batch.prefill,
        logit_rows=there(batch.logit_rows),
    )

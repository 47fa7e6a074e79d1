"""Steps on a GPU: decodes as a CUDA graph a bucket of rows, then the step's prefill, in graphs but for its attention.

The host never waits for a step before it launches the next: a token that it has not seen yet is named by the row of the
step before that samples it. All launches are on one stream, so a page may have a new owner while an older step that
names it is under way: the newer one's writes come later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
from kernels.mla_prefill import PrefillScratch, load_expansions
from kernels.sample import Logprobs, SampleParams
from kernels.sizes import holding
from services.gpu_worker.batch import Batch, Feed
from services.gpu_worker.batch import Chunk as PromptChunk
from services.gpu_worker.device_link import IN_FLIGHT, DeviceLink
from services.gpu_worker.model import Cache, Model
from services.gpu_worker.planner import UNKNOWN, Chunk, Plan, Sequence
from services.gpu_worker.runner import Computed, StepFailed
from services.gpu_worker.sampler import Sampled, Sampler, int64, logprobs_of
from services.gpu_worker.scoring import ROWS, Scoring, score_prompts
from services.gpu_worker.step import build_batch
from services.gpu_worker.work import Arena, Work


def buckets(most: int) -> list[int]:
    """The numbers of rows that decode graphs are captured for: padding costs a sixth at most from 16 rows on."""
    small = [n for n in (1, 2, 4, 8, 12) if n < most]
    steps = [n for n in range(16, most, 8 if most <= 128 else 16)]
    return [*small, *steps, most]


def prefill_buckets(most: int) -> list[int]:
    """The numbers of prompt rows that passes are captured for. The more rows, the closer: few take hardly longer than
    fewer, while of many all must be computed."""
    quarters = [(k, (4,) if k < 7 else (4, 6) if k < 10 else (4, 5, 6, 7)) for k in range(4, most.bit_length())]
    return [*(n for k, many in quarters for n in (m << k - 2 for m in many) if n < most), most]


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


class PrefillGraph:
    """A pass of one number of rows in as many graphs as it has layers, and one more: attention runs between them, for
    its launches go with the contexts. Launched one by one, a pass takes the host longer than the device."""

    _INPUTS = ("tokens", "positions", "write")

    def __init__(self, rows: int, model: Model, cache: Cache, arena: Arena) -> None:
        self.work = model.new_work(rows, new=arena.turn())
        self._rows, self._model, self._cache = rows, model, cache
        self._device = torch.zeros(len(self._INPUTS), rows, dtype=torch.int64, device="cuda")
        self._host = [torch.zeros(self._device.shape, dtype=torch.int64, pin_memory=True) for _ in range(IN_FLIGHT)]
        self._pieces: list[torch.cuda.CUDAGraph] = []

    def _around(self) -> Iterator[int]:
        nothing = torch.empty(0, 0, dtype=torch.int32, device="cuda")
        chunk = PromptChunk(0, self._rows, self._rows, nothing[:0])
        tokens, positions, write = self._device
        batch = Batch(tokens, positions, write, 0, nothing, nothing[:0], (chunk,), nothing[:0])
        return self._model.around_attention(batch, self._cache, self.work)

    @torch.inference_mode()
    def capture(self, pool: Any) -> Any:
        """The pool."""
        self._device[self._INPUTS.index("write")] = -1
        self.work.out.zero_()
        for _ in self._around():  # libraries choose and allocate here
            pass
        torch.cuda.synchronize()
        around, ended = self._around(), False
        while not ended:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, pool=pool):
                ended = next(around, None) is None
            pool = graph.pool()
            self._pieces.append(graph)
        for piece in self._pieces:
            piece.replay()  # the first time takes long: the driver sends it to the device
        return pool

    def replay(self, batch: Batch, turn: int, attend: Callable[[int], None]) -> Tensor:
        """As Model.hidden: [T, hidden]. `batch` is the host's."""
        count, host = len(batch.tokens), self._host[turn]
        for row, (name, padding) in enumerate(zip(self._INPUTS, (0, 0, -1), strict=True)):
            host[row, :count] = getattr(batch, name)
            host[row, count:] = padding
        self._device.copy_(host, non_blocking=True)
        self.work.out[count:].zero_()  # rows of padding are all alike so, and choose few experts
        for layer, piece in enumerate(self._pieces):
            piece.replay()
            if layer < len(self._pieces) - 1:
                attend(layer)
        return self.work.x[:count]


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
    rest: list[Callable[[], None]]  # what is still to be launched of it: how its decodes are sampled, then its end


class GpuRunner:
    overlaps = True

    def __init__(
        self, model: Model, cache: Cache, sampler: Sampler, *, max_batch: int, max_context: int,
        fp8_cache: bool = False, links: StepLinks | None = None,
    ) -> None:  # fmt: skip
        self._model, self._cache, self._sampler, self._fp8_cache = model, cache, sampler, fp8_cache
        self._links = links
        self._oks = [torch.ones(1, dtype=torch.int32, pin_memory=True) for _ in range(IN_FLIGHT)]
        self._max_batch, self._max_context = max_batch, max_context
        self._inputs = Inputs(max_batch)
        self._table = BlockTable(max_batch, -(-max_context // PAGE))
        # Of decode rows, then of the step's prompts that end.
        self._sampled = torch.zeros(2 * max_batch, dtype=torch.int64, device="cuda")
        self._results = [torch.zeros(2 * max_batch, dtype=torch.int64, pin_memory=True) for _ in range(IN_FLIGHT)]
        self._row_of: dict[Sequence, int] = {}  # whose last token the step before samples: where in `_sampled`
        self._turn = 0
        self._prefills: dict[int, PrefillGraph] = {}
        self._scratch: PrefillScratch | None = None
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

    def capture(self, prefill_rows: int) -> None:
        """All decode graphs, the largest first: the smaller ones' scratch lies in what it took; then those of prefills
        of up to so many rows."""
        self._blank(self._max_batch)
        for rows in reversed(buckets(self._max_batch)):
            one = self._prepare(rows)
            self.works[rows] = one.work
            forward, greedy, random = (self._graph(launch) for launch in (one.forward, one.greedy, one.random))
            self.graphs[rows] = DecodeGraph(forward, greedy, random, one.logits, one.work.x)
        arena = Arena()
        for rows in reversed(prefill_buckets(prefill_rows)):
            self._prefills[rows] = PrefillGraph(rows, self._model, self._cache, arena)
            self._pool = self._prefills[rows].capture(self._pool)
        # Of one prompt, or of many that are short: longer ones together are attended in turn.
        context = max(self._max_context, prefill_rows)
        self._scratch = self._model.prefill_scratch(max(PAGE, 1 << (context - 1).bit_length()))
        with torch.inference_mode():
            self._load()
        torch.cuda.synchronize()

    def time_decodes(self) -> float:
        """Seconds of the largest decode graph, with nothing in the cache."""
        self._blank(self._max_batch)
        graph = self.graphs[self._max_batch]

        def step() -> None:
            graph.forward.replay()
            graph.greedy.replay()

        return _seconds(step)

    def bucket(self, rows: int) -> int:
        """The size of the graph that takes so many decodes."""
        return holding(self.graphs, rows)

    # ---- a step

    def begin(self) -> None:
        torch.mm(*torch.zeros(2, 16, 16, dtype=self._model.dtype, device="cuda"))  # cuBLAS's handle is a thread's own

    def launch(self, plan: Plan, late: bool = False) -> UnderWay:
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
        rest: list[Callable[[], None]] = []
        if decoding:
            sample, hidden = self._decode(plan.decodes, decoding, late)
            if late:
                rest.append(lambda: logs.extend(_on_the_way(decoding, sample())))
            else:
                logs += _on_the_way(decoding, sample())
            scored += score_prompts(self._model, Plan(plan.decodes, ()), hidden)
        if plan.prefills:
            found, hidden = self._prefill(plan.prefills, prompts)
            logs += _on_the_way(prompts, found)
            scored += score_prompts(self._model, Plan((), plan.prefills), hidden)
        self._row_of = row_of
        rows = [row_of[sequence] for sequence in sampled]
        host, ok = self._results[self._turn], self._oks[self._turn]
        done = torch.cuda.Event(blocking=True, enable_timing=True)

        def end() -> None:
            host.copy_(self._sampled, non_blocking=True)
            if self._links is not None:
                ok.copy_(self._links.device.peers.ok, non_blocking=True)
            done.record()

        launched = UnderWay(sampled, rows, host, logs, scored, ok, began, done, [*rest, end])
        if not late:
            self.complete(launched)
        return launched

    def complete(self, launched: UnderWay) -> None:
        while launched.rest:
            launched.rest.pop(0)()

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
        del launched.rest[:-1]  # what it would sample
        self.complete(launched)
        self._ended(launched)

    def _ended(self, launched: UnderWay) -> bool:
        launched.done.synchronize()
        ok = bool(launched.ok[0])
        if self._links is not None:
            self._links.end_step(ok)
        return ok

    # ---- decodes

    def _decode(
        self, chunks: tuple[Chunk, ...], sequences: tuple[Sequence, ...], late: bool
    ) -> tuple[Callable[[], Logprobs | None], Tensor]:
        """What samples, and the hidden rows."""
        count = len(chunks)
        bucket = self.bucket(count)
        self._tell(chunks, bucket)
        graph, outputs = self.graphs[bucket], tuple(s.outputs for s in sequences)
        mask = None if late else self._sampler.begin(sequences)
        if self._links is not None:
            self._links.ring(bucket, prefill=False)
        graph.forward.replay()
        if self._sampler.plain(sequences):
            random = any(s.request.sampling.temperature > 0 for s in sequences)
            (graph.random if random else graph.greedy).replay()
            return lambda: None, graph.hidden
        sample = self._sampler.later(sequences, graph.logits[:count], self._sampled[:count])
        return lambda: sample(self._sampler.begin(sequences, outputs) if late else mask), graph.hidden

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
        graph.replay()  # the first time takes long: the driver sends it to the device
        return graph

    # ---- prefill

    def _prefill(self, chunks: tuple[Chunk, ...], prompts: tuple[Sequence, ...]) -> tuple[Logprobs | None, Tensor]:
        batch, mask = build_batch(Plan((), chunks)), self._sampler.begin(prompts)
        hidden = self._pass(batch)
        if not prompts:
            return None, hidden
        logits = self._model.logits(hidden, to_device(batch.logit_rows, "cuda"))
        out = self._sampled[self._max_batch : self._max_batch + len(prompts)]
        return self._sampler.sample(prompts, logits, out, mask), hidden

    def _pass(self, batch: Batch) -> Tensor:
        """[T, hidden] of prompt rows; `batch` is the host's."""
        size = holding(self._prefills, len(batch.tokens))
        if self._links is not None:
            self._links.ring(size, prefill=True)
        graph = self._prefills[size]
        attend = self._model.attention(batch, self._cache, graph.work, self._scratch)
        return graph.replay(batch, self._turn, attend)

    def _load(self) -> None:
        """What a library would load while it serves, once it meets a number of rows."""
        assert self._scratch is not None
        layer = self._model.weights.layers[0]
        load_expansions(layer.w_uk, layer.w_uv, self._scratch)
        hidden = self._prefills[max(self._prefills)].work.x.zero_()
        most = max(self._max_batch, ROWS)  # prompts that end in a step, or rows that are scored
        for rows in range(min(most, len(hidden)), 0, -1):  # the largest first: the others fit into that
            self._model.logits(hidden[:rows])

    def time_prefill(self, rows: int, context: int) -> float:
        """Seconds of a pass of so many rows that ends a prompt of `context` tokens, with nothing in the cache."""

        def step() -> None:
            with torch.inference_mode():
                self._model.logits(self._pass(blank_prefill(rows, context, self._model.config.vocab))[-1:])

        return _seconds(step)


def _seconds(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def blank_prefill(rows: int, context: int, vocab: int) -> Batch:
    """So many rows that end a prompt of `context` tokens and are written nowhere; all pages are the first one."""
    positions, nothing = torch.arange(context - rows, context), torch.zeros(0, 0, dtype=torch.int32)
    return Batch(
        tokens=positions % vocab,  # that differ: equal ones would all choose the same few experts
        positions=positions,
        write=torch.full((rows,), -1),
        n_decode=0,
        block_table=nothing,
        context=nothing[:0],
        prefill=(PromptChunk(0, rows, context, torch.zeros(-(-context // PAGE), dtype=torch.int64)),),
        logit_rows=torch.zeros(1, dtype=torch.int64),
    )


def _on_the_way(sequences: tuple[Sequence, ...], found: Logprobs | None) -> list[tuple[tuple[Sequence, ...], Logprobs]]:
    """To the host: read where they are, they would wait for the step behind this one."""
    if found is None:
        return []
    return [(sequences, Logprobs(*map(to_host, (found.wanted, found.chosen, found.ids, found.values))))]


def to_gpu(batch: Batch) -> Batch:
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

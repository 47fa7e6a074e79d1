"""The expert link on a GPU: a worker and its shards in one process, then in several under MPS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Streams whose kernels wait for each other must not share one of the GPU's queues.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import pytest
import torch

from benchmarks.link_rig import mps
from common.messages import Generate
from common.model_config import ModelConfig
from common.source import open_source
from services.expert_shard.stacks import load_stacks
from services.gpu_worker.weights import load_weights
from tests.engine_rig import ask
from tests.gpu_link_rig import LinksInProcess
from tests.test_gpu_engine import LIMIT, SHAPES, WIDTHS, Heard, Served, prompts, row_errors, told
from tests.test_model import error_ratio
from tests.tiny_models import make_model, write_checkpoint

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent
TINY = ROOT / "models" / "tiny"
KIND: dict[str, Any] = dict(max_batch=8, max_context=640, chunk_tokens=256, prefix_cache=True, pages=128)


class Steady(Served):
    """One whose first steps do not depend on when which request arrives: they begin when all are there."""

    def run(self, *requests: Generate) -> list[list[int]]:
        for request in requests:
            self.engine.submit(request)
        if not self.engine._thread.is_alive():
            self.engine.start()
        return self.told(*requests)


class Local(Steady):
    """All experts in the engine's own process, the shared ones computed apart as beside a link."""

    def __init__(self, folder: Path, *, experts_fp8: bool = False, **settings: Any) -> None:
        config = ModelConfig.load(folder)
        source = open_source(folder, config, "checkpoint")
        stacks = load_stacks(config, source, range(config.experts), "cuda", shared=False, fp8=experts_fp8)
        self._make(config, load_weights(config, source, "cuda"), stacks, KIND | settings)
        self.sizes: set[int] = set()  # rows of its prefills
        passed = self.engine.runner._prefill

        def noted(chunks: Any, sampled: Any) -> Any:
            self.sizes.add(sum(chunk.rows for chunk in chunks))
            return passed(chunks, sampled)

        self.engine.runner._prefill = noted


class Linked(Steady):
    """The experts behind mailboxes of `shards` shards, whose launching threads run in this process."""

    def __init__(
        self, folder: Path, shards: int, warm: set[int], *, experts_fp8: bool = False, slice_rows: int = 1 << 20,
        bound: float = 20.0, **settings: Any,
    ) -> None:  # fmt: skip
        from services.gpu_worker.gpu_engine import rehearse_prefill
        from services.gpu_worker.graphs import buckets, prefill_buckets

        config = ModelConfig.load(folder)
        source = open_source(folder, config, "checkpoint")
        kind = KIND | settings
        self.links = LinksInProcess(
            config, source, shards, max_batch=kind["max_batch"], chunk_tokens=kind["chunk_tokens"],
            buckets=buckets(kind["max_batch"]), fp8=config.fp8 or experts_fp8, bound=bound,
            slice_rows=slice_rows,
        )  # fmt: skip
        self._make(config, load_weights(config, source, "cuda"), None, kind | {"links": self.links})
        # One process is one context: a kernel that is loaded while others wait in it waits for them.
        for rows in sorted(warm):
            self.links.rehearse(min(size for size in prefill_buckets(kind["chunk_tokens"]) if size >= rows))
            rehearse_prefill(self.engine.runner._model, rows, kind["max_context"], False)
        torch.cuda.synchronize()
        self.links.start()

    def stop(self) -> None:
        self.engine.stop()
        self.links.stop()


def asked(vocab: int, count: int = 6, tokens: int = 40, **more: Any) -> list[Generate]:
    """Prompts of one chunk and of several, sampled and greedy."""
    return [
        ask(f"r{i}", p, max_tokens=tokens, temperature=0.8 * (i % 2), seed=i, ignore_eos=True, **more)
        for i, p in enumerate(prompts(count, 90, vocab) + prompts(1, 400, vocab))
    ]


@pytest.fixture(params=["tiny", *sorted(SHAPES)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "tiny":
        return TINY
    torch.manual_seed(5)
    return write_checkpoint(make_model(request.param, **WIDTHS | SHAPES[request.param]).to(torch.bfloat16), tmp_path)


@pytest.mark.parametrize("experts_fp8", [False, True], ids=["bf16", "fp8"])
def test_tokens_over_the_mailbox_are_those_of_the_local_link(folder: Path, experts_fp8: bool) -> None:
    """Exact class, sampled tokens among them."""
    requests = asked(ModelConfig.load(folder).vocab)
    local = Local(folder, experts_fp8=experts_fp8)
    want = local.run(*requests)
    local.engine.stop()
    linked = Linked(folder, 1, local.sizes, experts_fp8=experts_fp8)
    got = linked.run(*requests)
    linked.stop()
    assert got == want


def test_logits_over_the_mailbox_are_bit_by_bit_those_of_the_local_link(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asked(ModelConfig.load(folder).vocab, tokens=12, logprobs=0, prompt_logprobs=0)
    local = Local(folder)
    with monkeypatch.context() as patch:
        heard = Heard(local, patch)
        want_tokens = local.run(*requests)
        local.engine.stop()
    linked = Linked(folder, 1, local.sizes)
    with monkeypatch.context() as patch:
        linked_heard = Heard(linked, patch)
        assert linked.run(*requests) == want_tokens
        linked.stop()
    for request in requests:
        got, want = linked_heard.of(request), heard.of(request)
        assert len(want) == len(request.prompt) + 12 - 1
        assert torch.equal(got, want)


def scores(served: Served, requests: list[Generate]) -> torch.Tensor:
    """Logprobs of the prompts' own tokens."""
    found = []
    for request in requests:
        first = served.chunks[request.request_id][0]
        assert first.prompt_logprobs is not None
        found += [scored.logprob for scored in first.prompt_logprobs if scored is not None]
    return torch.tensor(found)


@pytest.mark.parametrize(("shards", "slice_rows"), [(2, 1 << 20), (3, 1 << 20), (2, 64)])
def test_shards_and_slices_change_little(
    folder: Path, shards: int, slice_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Close class, teacher-forced; all requests end. (A choice of experts that turns over changes a row by more, so of
    logits the row in the median is held.)"""
    vocab = ModelConfig.load(folder).vocab
    requests = [
        ask(f"r{i}", p, max_tokens=24, temperature=1.0, seed=i, prompt_logprobs=0, ignore_eos=True)
        for i, p in enumerate(prompts(5, 150, vocab))
    ]
    local = Local(folder)
    with monkeypatch.context() as patch:
        heard = Heard(local, patch)
        local.run(*requests)
        local.engine.stop()
    linked = Linked(folder, shards, local.sizes, slice_rows=slice_rows)
    with monkeypatch.context() as patch:
        linked_heard = Heard(linked, patch)
        assert [len(tokens) for tokens in linked.run(*requests)] == [24] * len(requests)
        linked.stop()
    assert error_ratio(scores(linked, requests), scores(local, requests)) < LIMIT
    got, want = linked_heard.prompts(requests), heard.prompts(requests)
    told(f"{shards} shards, slices of {slice_rows}", got, want)
    assert float(row_errors(got, want).median()) < LIMIT


def test_a_shard_that_stops_ends_its_requests_with_a_reason() -> None:
    """Its launching thread is never started, so no kernel of it answers: the bound of the waits ends the step."""
    local = Local(TINY)
    requests = asked(2048, count=2)
    local.run(*requests)
    local.engine.stop()
    linked = Linked(TINY, 2, local.sizes, bound=1.0)
    linked.links.mute(1)
    began = time.monotonic()
    linked.run(*requests)
    took = time.monotonic() - began
    linked.stop()
    ends = [linked.chunks[r.request_id][-1] for r in requests]
    assert [chunk.finish for chunk in ends] == ["error"] * len(requests)
    assert all(chunk.error is not None and chunk.error[0] == "experts_unavailable" for chunk in ends)
    assert "s1 is late" in str(ends[0].error)
    assert took < 5.0


# ---- in processes of their own, under MPS


def apart(mode: str) -> dict[str, Any]:
    with mps():
        ran = subprocess.run(
            [sys.executable, "-m", "tests.gpu_link_apart", mode], cwd=ROOT, capture_output=True, text=True, timeout=400
        )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_shards_in_processes_give_the_local_links_tokens() -> None:
    found = apart("same")
    assert found["same 1"] == found["of"], found
    assert found["all 1"] and found["all 2"], found


def test_a_stopped_shard_ends_requests_within_the_bound() -> None:
    found = apart("stopped")
    assert found["finish"] == ["error"] * 4, found
    assert all(code == "experts_unavailable" and "s1" in why for code, why in found["errors"]), found
    assert found["took"] < found["bound"] + 3.0, found

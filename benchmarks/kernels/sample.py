from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import KernelCase, Launch
from kernels.sample.naive import Logprobs, SampleParams
from kernels.sample.naive import sample as naive_sample
from kernels.sample.triton import SampleScratch, candidates, sample, shape_name

SETS = 4  # the head's product has just written the logits: they are in the L2 as far as they fit
KINDS = {
    "greedy": dict(temperature=0.0),
    "temperature 1": dict(),
    "top_k 50, top_p 0.95": dict(top_k=50, top_p=0.95),
    "top_p 0.95": dict(top_p=0.95),
    "top_p 0.95, unsure": dict(top_p=0.95),
    "temperature 1, logprobs 5": dict(),
}


def new_params(rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SampleParams:
    def each(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    seed = torch.arange(rows, device="cuda")
    return SampleParams(each(temperature), each(top_k, torch.int64), each(top_p), each(0.0), seed, seed * 3)


def new_logits(rows: int, vocab: int, kind: str) -> Tensor:
    """As sharp as a trained model's: about 40 tokens hold 0.95 of the mass. Of a model that is unsure most do."""
    return torch.randn(rows, vocab, device="cuda") * (1.0 if "unsure" in kind else 6.5)


def new_logs(rows: int) -> Logprobs:
    wanted = torch.full((rows,), 5, device="cuda")
    ids = torch.empty(rows, 5, dtype=torch.int64, device="cuda")
    return Logprobs(wanted, torch.empty(rows, device="cuda"), ids, torch.empty(rows, 5, device="cuda"))


def torch_peer(rows: int, vocab: int, kind: str) -> Callable[[], list[Launch]]:
    """What one writes with torch alone and can capture: a sort for the filters, exponentials for the multinomial."""

    def pick(logits: Tensor) -> object:
        if kind == "greedy":
            return logits.argmax(-1)
        p = logits.softmax(-1)
        extra = logits.log_softmax(-1).topk(5) if "logprobs" in kind else None
        if "top_p" in kind:
            p, order = p.sort(-1, descending=True)
            if "top_k" in kind:
                p[:, 50:] = 0
            p[(p.cumsum(-1) - p) > 0.95 * p.sum(-1, keepdim=True)] = 0
            return order.gather(1, (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))
        return (p / torch.empty_like(p).exponential_()).argmax(-1), extra

    return lambda: [partial(pick, new_logits(rows, vocab, kind)) for _ in range(SETS)]


def flashinfer_peer(rows: int, vocab: int, kind: str) -> Callable[[], list[Launch]]:
    def make() -> list[Launch]:
        import flashinfer.sampling as peer

        def pick(logits: Tensor) -> object:
            if "top_k" in kind:
                return peer.top_k_top_p_sampling_from_logits(logits, 50, 0.95, filter_apply_order="top_k_first")
            p = logits.softmax(-1)
            return peer.top_p_sampling_from_probs(p, 0.95) if "top_p" in kind else peer.sampling_from_probs(p)

        return [partial(pick, new_logits(rows, vocab, kind)) for _ in range(SETS)]

    return make


def vllm_peer(rows: int, vocab: int, kind: str) -> Callable[[], list[Launch]]:
    def make() -> list[Launch]:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample

        def pick(logits: Tensor) -> object:
            if "top_p" in kind:
                k = torch.full((rows,), 50, device="cuda") if "top_k" in kind else None
                logits = apply_top_k_top_p(logits, k, torch.full((rows,), 0.95, device="cuda"))
            return random_sample(logits.softmax(-1, dtype=torch.float32), {})

        return [partial(pick, new_logits(rows, vocab, kind)) for _ in range(SETS)]

    return make


def case(rows: int, vocab: int, kind: str) -> KernelCase:
    def make(tile: dict | None) -> list[Launch]:
        params, logs = new_params(rows, **KINDS[kind]), new_logs(rows) if "logprobs" in kind else None  # type: ignore[arg-type]
        out, scratch = torch.empty(rows, dtype=torch.int64, device="cuda"), SampleScratch.empty(rows, vocab, "cuda")

        def one() -> Launch:
            logits = new_logits(rows, vocab, kind)
            return lambda: sample(logits, params, out, None, None, None, logs, scratch, tile)

        return [one() for _ in range(SETS)]

    def check() -> float:
        """The share of tokens that are not naive's: 0, or a near tie."""
        logits, params = new_logits(rows, vocab, kind), new_params(rows, **KINDS[kind])  # type: ignore[arg-type]
        out, want = torch.empty(2, rows, dtype=torch.int64, device="cuda")
        sample(logits, params, out, None, None, None, None, SampleScratch.empty(rows, vocab, "cuda"))
        naive_sample(logits, params, want)
        return float((out != want).float().mean())

    peers = {"torch": torch_peer(rows, vocab, kind)}
    if kind != "greedy":
        peers |= {"flashinfer": flashinfer_peer(rows, vocab, kind), "vLLM": vllm_peer(rows, vocab, kind)}
    tuned = ("sample", shape_name(torch.empty(0, vocab)), rows) if (rows, kind) == (64, "temperature 1") else None
    return KernelCase(
        "sample", f"{rows} x {vocab}, {kind}", make, bytes=4 * rows * vocab,
        tiles=candidates if tuned else list, tuned=tuned, check=check, peers=peers,
        goal="<= 15 us" if (rows, vocab, kind) == (64, 129280, "temperature 1") else "",
    )  # fmt: skip


def cases() -> list[KernelCase]:
    return [case(rows, vocab, kind) for vocab in (129280, 102400) for rows in (1, 16, 64) for kind in KINDS]

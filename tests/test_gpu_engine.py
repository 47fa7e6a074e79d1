"""The engine on a GPU: graphs, overlapping steps, and what a late stop makes of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import services.gpu_worker.scoring as scoring
from common.messages import Generate, Grammar
from common.model_config import ModelConfig
from common.source import open_source
from services.expert_shard.stacks import load_stacks
from services.gpu_worker.model import Model
from services.gpu_worker.planner import Plan, Sequence
from services.gpu_worker.weights import load_weights
from tests.engine_rig import TINY, Told, ask
from tests.kernel_checks import DEVICE
from tests.rounding import rounded
from tests.test_loading import write_fp8
from tests.test_model import error_ratio, open_model, whole
from tests.tiny_models import make_model, write_checkpoint

pytestmark = pytest.mark.gpu

LIMIT = 2e-2
ASLEEP = 400_000_000  # cycles, a fifth of a second: many times what a launch of TINY takes the host
# Times the rounding that tests/rounding.py imitates, which leaves out what lies between an expert's two products.
MORE = 1.5
SHAPES: dict[str, dict[str, Any]] = {
    "v2-lite-like": dict(n_routed_experts=16, num_experts_per_tok=4),
    "v3-like": dict(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, q_lora_rank=128),
}
WIDTHS: dict[str, Any] = dict(
    vocab_size=640, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, kv_lora_rank=128,
    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, num_attention_heads=8, num_key_value_heads=8,
    initializer_range=0.05,
)  # fmt: skip
# As many experts and groups as the published ones have: with fewer, a choice that turns over changes more of a row.
WIDE: dict[str, dict[str, Any]] = {
    name: dict(
        hidden_size=1024, intermediate_size=2048, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, num_attention_heads=16, num_key_value_heads=16, initializer_range=0.02,
    ) | own
    for name, own in {
        "v2-lite-like": dict(n_routed_experts=64, num_experts_per_tok=6),
        "v3-like": dict(
            n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, q_lora_rank=384, n_shared_experts=1
        ),
    }.items()
}  # fmt: skip


class Served(Told):
    """An engine with all experts in this process."""

    def __init__(self, folder: Path, *, overlaps: bool = True, experts_fp8: bool = False, **settings: Any) -> None:
        config = ModelConfig.load(folder)
        source = open_source(folder, config, "checkpoint")
        stacks = load_stacks(config, source, range(config.experts), "cuda", shared=True, fp8=experts_fp8)
        weights = load_weights(config, source, "cuda", shared=False)
        kind = dict(max_batch=8, max_context=640, chunk_tokens=256, prefix_cache=True, pages=128) | settings
        self._make(config, weights, stacks, kind)
        self.engine.runner.overlaps = overlaps
        self.engine.start()

    def _make(self, config: ModelConfig, weights: Any, stacks: Any, settings: dict[str, Any]) -> None:
        from services.gpu_worker.gpu_engine import make_engine

        super().__init__()
        self.engine = make_engine(config, weights, stacks, self.emit, **settings)

    def run(self, *requests: Generate) -> list[list[int]]:
        """Each one's tokens."""
        for request in requests:
            self.submit(request)
        return self.told(*requests)

    def told(self, *requests: Generate) -> list[list[int]]:
        self.wait(requests)
        return [[token for chunk in self.chunks[r.request_id] for token in chunk.tokens] for r in requests]


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab, (length + 7 * i,), generator=draw).tolist() for i in range(count)]


class Heard:
    """The logits that an engine scores prompts by, and those that it samples from, of each request in order. It listens
    where requests ask for logprobs: what plain ones are sampled from, no launch of the host's names."""

    def __init__(self, served: Told, monkeypatch: pytest.MonkeyPatch) -> None:
        self.served = served
        self._scored, self._sampled = defaultdict[str, list[Tensor]](list), defaultdict[str, list[Tensor]](list)
        sampler, score = served.engine._sampler, scoring._score
        later = sampler.later

        def scored(model: Model, hidden: Tensor, sequence: Sequence, rows: range, at: int) -> Any:
            places = torch.arange(rows.start + at, rows.stop + at, device=hidden.device)
            self._scored[sequence.request.request_id].append(model.logits(hidden, places).float())
            return score(model, hidden, sequence, rows, at)

        def sampled(sequences: tuple[Sequence, ...], logits: Tensor, out: Tensor) -> Any:
            for sequence, row in zip(sequences, logits, strict=True):
                self._sampled[sequence.request.request_id].append(row.float().clone()[None])
            return later(sequences, logits, out)

        monkeypatch.setattr(scoring, "_score", scored)
        monkeypatch.setattr(sampler, "later", sampled)

    def prompts(self, asked: list[Generate]) -> Tensor:
        """The logits of their prompts' tokens but the last."""
        return torch.cat([row for request in asked for row in self._scored[request.request_id]]).cpu()

    def of(self, request: Generate) -> Tensor:
        """[its tokens but the last, vocab]."""
        return torch.cat(self._scored[request.request_id] + self._sampled[request.request_id]).cpu()

    def texts(self, given: list[list[int]], tokens: int) -> tuple[list[list[int]], Tensor]:
        """Each prompt with so many tokens after it, and logits [T, vocab] of all tokens but each text's last. What the
        engine told of logprobs is theirs."""
        asked = [
            ask(f"r{i}", p, max_tokens=tokens, temperature=1.0, seed=i, logprobs=3, prompt_logprobs=0, ignore_eos=True)
            for i, p in enumerate(given)
        ]
        for request in asked:
            self.served.submit(request)
        self.served.wait(asked)
        self.served.engine.stop()
        texts, found = [], []
        for prompt, request in zip(given, asked, strict=True):
            chunks = self.served.chunks[request.request_id]
            text = prompt + [token for chunk in chunks for token in chunk.tokens]
            logits = self.of(request)
            assert len(text) == len(prompt) + tokens == len(logits) + 1
            assert chunks[0].prompt_logprobs is not None
            told = [one.logprob for one in chunks[0].prompt_logprobs[1:] if one is not None]
            told += [one.logprob for chunk in chunks for one in chunk.logprobs or ()]
            own = own_logprobs(logits, text)
            torch.testing.assert_close(torch.tensor(told), own, rtol=1e-4, atol=1e-3)
            texts.append(text)
            found.append(logits)
        return texts, torch.cat(found)


def own_logprobs(logits: Tensor, text: list[int]) -> Tensor:
    """Of all tokens of a text but the first. `logits` [T - 1, vocab]: of all but the last."""
    return logits.log_softmax(-1)[torch.arange(len(logits)), torch.tensor(text[1:])]


def logits_by(logits_of: Callable[[Tensor], Tensor], texts: list[list[int]]) -> Tensor:
    """The same by another model, teacher-forced. `logits_of`: tokens [T] -> [T, vocab]."""
    return torch.cat([logits_of(torch.tensor(text))[:-1].float().cpu() for text in texts])


def by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs = theirs.to(DEVICE).eval()

    def logits_of(text: Tensor) -> Tensor:
        with torch.no_grad():
            return theirs(text[None].to(DEVICE)).logits[0]

    return logits_of


def row_errors(got: Tensor, want: Tensor) -> Tensor:
    """error_ratio of each row."""
    return (got - want).square().mean(1).sqrt() / want.square().mean(1).sqrt()


def told(what: str, got: Tensor, want: Tensor) -> float:
    """error_ratio; `pytest -rP` shows it, for the record."""
    error, median = error_ratio(got, want), float(row_errors(got, want).median())
    print(f"{what}: error RMS / reference RMS {error:.2e}, of a row in the median {median:.2e}")
    return error


@pytest.fixture(params=sorted(WIDE))
def wide(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name = request.param
    made: Any = make_model(name, **WIDTHS | WIDE[name])
    return write_checkpoint(made.to(torch.bfloat16), tmp_path / "model")


def test_prefill_and_decode_agree_with_transformers(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32. Where a choice of experts turns over, bf16 costs more than LIMIT, and transformers in bf16 too."""
    texts, got = Heard(Served(wide, chunk_tokens=128), monkeypatch).texts(prompts(5, 150, 640), 24)
    want, theirs = (logits_by(by_transformers(wide, dtype), texts) for dtype in (torch.float32, torch.bfloat16))
    bound = MORE * told("transformers in bf16", theirs, want)
    assert told("ours", got, want) < max(LIMIT, bound)
    assert row_errors(got, want).median() < MORE * row_errors(theirs, want).median()


@pytest.mark.parametrize("way", ["reused", "computed again"])
def test_a_prefix_changes_little_when_it_is(way: str, wide: Path) -> None:
    """Close class: from the prefix cache, or after a preemption (twelve pages for five requests of four). The told
    logprobs' error in the median, since what is preempted may be sampled twice."""
    again = way == "computed again"
    served = Served(wide, chunk_tokens=128, pages=12 if again else 128, prefix_cache=not again)
    given = prompts(5, 150, 640)
    if not again:
        served.run(*(ask(f"before{i}", p, max_tokens=1) for i, p in enumerate(given)))
    asked = [
        ask(f"r{i}", p, max_tokens=60, temperature=1.0, seed=i, logprobs=0, ignore_eos=True)
        for i, p in enumerate(given)
    ]
    found = served.run(*asked)
    served.engine.stop()
    assert bool(served.preemptions) is again
    assert [served.chunks[r.request_id][0].cached_tokens for r in asked] == [0 if again else 128] * len(asked)
    texts = [prompt + tokens for prompt, tokens in zip(given, found, strict=True)]
    chunks = [chunk for request in asked for chunk in served.chunks[request.request_id]]
    got = torch.tensor([one.logprob for chunk in chunks for one in chunk.logprobs or ()])

    def error(logprobs: Tensor) -> float:
        return float((logprobs - want).abs().median())

    def told_by(dtype: torch.dtype) -> Tensor:
        theirs = by_transformers(wide, dtype)
        return torch.cat([own_logprobs(logits_by(theirs, [text]), text)[-60:] for text in texts])

    want, theirs = told_by(torch.float32), told_by(torch.bfloat16)
    print(f"{way}: median error {error(got):.2e}, of transformers in bf16 {error(theirs):.2e}")
    assert len(got) == len(want) == 5 * 60
    assert error(got) < MORE * error(theirs)


def test_an_fp8_cache_costs_what_its_rounding_costs(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, got = Heard(Served(wide, chunk_tokens=128, fp8_cache=True), monkeypatch).texts(prompts(5, 150, 640), 24)
    want, cpu = logits_by(by_transformers(wide), texts), open_model(wide)
    with rounded(cache=True):
        cost = told("the rounding alone", logits_by(lambda text: whole(cpu, text), texts), want)
    assert told("ours", got, want) < MORE * cost


@pytest.mark.parametrize("v_dim", [64, 128], ids=["coded by a launch of its own", "coded where sums are brought back"])
def test_an_fp8_checkpoint_costs_what_the_rounding_of_activations_costs(
    tmp_path: Path, v_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers with its dequantised weights: LIMIT is below what activations in 8 bits cost."""
    widths = WIDTHS | WIDE["v3-like"] | {"v_head_dim": v_dim}
    kept = write_fp8("v3-like", tmp_path / "model", **widths)
    plain = write_checkpoint(make_model("v3-like", **widths), tmp_path / "plain")
    save_file(kept, plain / "model.safetensors", metadata={"format": "pt"})
    served = Served(tmp_path / "model", chunk_tokens=128)
    texts, got = Heard(served, monkeypatch).texts(prompts(5, 150, 640), 24)
    want, cpu = logits_by(by_transformers(plain), texts), open_model(plain)
    with rounded(rows=True):
        cost = told("the rounding alone", logits_by(lambda text: whole(cpu, text), texts), want)
    assert told("ours", got, want) < MORE * cost


def test_overlapping_changes_no_token() -> None:
    """Exact class: the same tokens whether or not a step is launched before the one before it has been seen."""
    given, runs = prompts(6, 90, 2000), []
    for overlaps in (True, False):
        served = Served(TINY, overlaps=overlaps)
        runs.append(served.run(*(ask(f"r{i}", p, max_tokens=40, temperature=0.8, seed=i, ignore_eos=True)
                                 for i, p in enumerate(given))))  # fmt: skip
        served.engine.stop()
    assert runs[0] == runs[1]
    assert all(len(tokens) == 40 for tokens in runs[0])


def test_a_stop_found_late_ends_the_text_and_the_pages_come_back() -> None:
    served = Served(TINY)
    (prompt,) = prompts(1, 70, 2000)
    (free,) = served.run(ask("free", prompt, max_tokens=30, temperature=1.0, seed=9, ignore_eos=True))
    stop = next(t for i, t in enumerate(free) if i >= 3 and t not in free[:i])
    (stopped,) = served.run(ask("s", prompt, max_tokens=30, temperature=1.0, seed=9, ignore_eos=True,
                                stop_token_ids=(stop,)))  # fmt: skip
    assert stopped == free[: free.index(stop) + 1]
    assert served.finish("s") == "stop" and served.chunks["s"][-1].stop_token == stop
    assert [c.index for c in served.chunks["s"]] == list(range(len(stopped)))
    served.run(ask("after", prompt[:40], max_tokens=2, ignore_eos=True))  # a step later everything has been taken in
    served.engine.stop()
    served.engine.planner.check()
    assert served.engine.planner.allocator.owned == 0


def test_preempted_ones_finish() -> None:
    """Twelve pages for six requests that come to need three each."""
    served = Served(TINY, pages=12, prefix_cache=False)
    given = prompts(6, 60, 2000)
    found = served.run(*(ask(f"r{i}", p, max_tokens=64, temperature=0.0, ignore_eos=True)
                         for i, p in enumerate(given)))  # fmt: skip
    served.engine.stop()
    assert [len(tokens) for tokens in found] == [64] * 6
    assert served.engine.planner.allocator.owned == 0


@pytest.mark.parametrize(
    "sampling",
    [
        dict(temperature=0.0),
        dict(temperature=1.0, top_p=0.8, seed=1),
        dict(temperature=1.0, top_k=20, seed=2),
        dict(temperature=1.0, min_p=0.05, seed=3),
        dict(temperature=1.0, seed=4, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.1),
        dict(temperature=1.0, seed=5, logit_bias=((17, 100.0),)),
        dict(temperature=1.0, seed=6, min_tokens=10, logprobs=5),
        dict(temperature=1.0, seed=7, grammar=Grammar("regex", "(yes|no|perhaps){30}"), frequency_penalty=0.5),
        dict(temperature=1.0, seed=8, grammar=Grammar("regex", "(yes|no){3}"), logprobs=1),
    ],
)
def test_a_row_does_not_depend_on_overlap_or_neighbours_sampling(sampling: dict[str, Any]) -> None:
    """One request of each kind beside plain ones: the plain ones keep their tokens, and so does it without overlap."""
    plain = [ask(f"p{i}", p, max_tokens=20, temperature=1.0, seed=i, ignore_eos=True)
             for i, p in enumerate(prompts(3, 50, 2000))]  # fmt: skip
    special = ask("s", list(range(5, 69)), max_tokens=20, ignore_eos="min_tokens" not in sampling, **sampling)
    runs = []
    for overlaps in (True, False):
        served = Served(TINY, overlaps=overlaps)
        runs.append(served.run(*plain, special))
        served.engine.stop()
    assert runs[0] == runs[1]
    if "logit_bias" in sampling:
        assert set(runs[0][-1]) == {17}


@pytest.mark.parametrize(
    "sampling",
    [
        dict(temperature=0.0),
        dict(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
        dict(temperature=0.0, logprobs=2, min_tokens=3),
        dict(temperature=0.0, prompt_logprobs=2),
        dict(temperature=0.8, frequency_penalty=0.7, repetition_penalty=1.1),
        dict(temperature=0.8, logprobs=2, logit_bias=((17, 1.0),)),
        dict(temperature=0.8, grammar=Grammar("regex", "[a-z ]{30,}")),
    ],
    ids=["greedy", "random", "logprobs", "scores", "penalties", "bias", "grammar"],
)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_launch_waits_for_the_gpu(sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of prefill, of both and of decodes are launched while the GPU sleeps, and it still does afterwards: that
    shows what torch's own mode does not, such as copies from memory that is not pinned."""
    served = Served(TINY, prefix_cache=False)
    served.engine.stop()  # its thread: the steps are made here
    engine, launch, complete = served.engine, served.engine.runner.launch, served.engine.runner.complete
    plans: list[Plan] = []
    waited: list[bool] = []
    awake = torch.cuda.Event()

    def run(mode: str) -> None:
        def unawaited(launching: Callable[[], Any]) -> Any:
            torch.cuda.set_sync_debug_mode(mode)
            try:
                launched = launching()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            waited.append(awake.query())
            return launched

        def launch_asleep(plan: Plan, late: bool = False) -> Any:
            torch.cuda._sleep(ASLEEP)
            awake.record()
            plans.append(plan)
            return unawaited(lambda: launch(plan, late))

        def complete_asleep(launched: Any) -> None:
            unawaited(lambda: complete(launched))

        monkeypatch.setattr(engine.runner, "launch", launch_asleep)
        monkeypatch.setattr(engine.runner, "complete", complete_asleep)
        requests = [ask(f"{mode} {i}", p, max_tokens=4, seed=i, ignore_eos="min_tokens" not in sampling, **sampling)
                    for i, p in enumerate(prompts(3, 110, 2000))]  # fmt: skip
        for request in requests:
            served.submit(request)
        engine._take_notes()
        while not all(served.finish(request.request_id) for request in requests):
            engine.step()

    with torch.inference_mode():
        run("default")  # compiles kernels, and allocates what the same steps then find allocated
        plans.clear()
        waited.clear()
        run("error")
    assert {(bool(plan.decodes), bool(plan.prefills)) for plan in plans} == {(False, True), (True, True), (True, False)}
    assert not any(waited)

"""Logits against transformers' own implementation, on random checkpoints that it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.checkpoint import Checkpoint
from common.errors import ConfigError
from common.link import LocalLink, PeerLost
from common.model_config import ModelConfig
from common.pages import PAGE
from services.expert_shard.experts import ExpertStore
from services.gpu_worker.batch import Batch, Chunk
from services.gpu_worker.model import Model
from services.gpu_worker.weights import load_weights
from tests.tiny_models import MODELS, make_model, write_checkpoint

TINY = Path(__file__).parent.parent / "models" / "tiny"
LIMIT = 1e-5  # error RMS / reference RMS; what is promised is 1e-4


def error_ratio(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def open_model(folder: Path) -> Model:
    config, checkpoint = ModelConfig.load(folder), Checkpoint(folder)
    store = ExpertStore(config, checkpoint)
    store.load(range(config.partitions))
    return Model(config, load_weights(config, checkpoint), LocalLink(store.compute))


def reference(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens[None]).logits[0]


@dataclass
class Run:
    """Sequences in one cache, their pages scattered over it; `step` computes some rows of each and keeps the logits."""

    model: Model
    sequences: Sequence[Tensor]
    logits: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = [-(-len(tokens) // PAGE) for tokens in self.sequences]
        order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1))
        self.pages = order[: sum(counts)].split(counts)
        # What an earlier owner left in a page must not show.
        self.cache = [layer.normal_(std=30.0) for layer in self.model.new_cache(len(order))]
        self.done = [0] * len(self.sequences)
        self.logits = [[] for _ in self.sequences]

    def step(self, rows: Sequence[int]) -> None:
        """rows[i] of sequence i: 0 for none, 1 for a decode, more for a chunk of prefill."""
        order = [i for i, n in enumerate(rows) if n == 1] + [i for i, n in enumerate(rows) if n > 1]
        spans = [(i, self.done[i], self.done[i] + rows[i]) for i in order]
        batch = self._batch(spans)
        logits = self.model.logits(self.model.hidden(batch, self.cache), batch.logit_rows)
        for (i, _, end), part in zip(spans, logits.split([b - a for _, a, b in spans]), strict=True):
            self.logits[i].append(part)
            self.done[i] = end

    def _batch(self, spans: list[tuple[int, int, int]]) -> Batch:
        decodes = [(i, end) for i, start, end in spans if end - start == 1]
        widest = max((-(-end // PAGE) for _, end in decodes), default=0)
        table = torch.zeros(len(decodes), widest, dtype=torch.int64)
        prefill, at = [], 0
        for row, (i, end) in enumerate(decodes):
            used = -(-end // PAGE)
            table[row, :used] = self.pages[i][:used]
        for i, start, end in spans:
            if end - start > 1:
                prefill.append(Chunk(at, end - start, end, self.pages[i][: -(-end // PAGE)]))
            at += end - start
        positions = [torch.arange(start, end) for _, start, end in spans]
        return Batch(
            tokens=torch.cat([self.sequences[i][start:end] for i, start, end in spans]),
            positions=torch.cat(positions),
            write=torch.cat(
                [self.pages[i][p // PAGE] * PAGE + p % PAGE for (i, _, _), p in zip(spans, positions, strict=True)]
            ),
            n_decode=len(decodes),
            block_table=table,
            context=torch.tensor([end for _, end in decodes], dtype=torch.int64),
            prefill=tuple(prefill),
            logit_rows=torch.arange(at),
        )

    def all_logits(self, sequence: int = 0) -> Tensor:
        return torch.cat(self.logits[sequence])


def whole(model: Model, tokens: Tensor) -> Tensor:
    run = Run(model, [tokens])
    run.step([len(tokens)])
    return run.all_logits()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    theirs = make_model(name)
    folder = write_checkpoint(theirs, tmp_path)
    tokens = torch.randint(0, theirs.config.vocab_size, (150,))
    assert error_ratio(whole(open_model(folder), tokens), reference(theirs, tokens)) < LIMIT


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_on_a_published_config(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(make_model(name), tmp_path, published=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, theirs.config.vocab_size, (70,))
    assert error_ratio(whole(open_model(folder), tokens), reference(theirs, tokens)) < LIMIT


@pytest.mark.parametrize("name", ["v2-lite-like", "v3-like"])
def test_chunks_and_decodes_equal_the_whole(tmp_path: Path, name: str) -> None:
    model = open_model(write_checkpoint(make_model(name), tmp_path))
    tokens = torch.randint(0, model.config.vocab, (200,))
    want = whole(model, tokens)
    for sizes in ([64, 64, 72], [7, 120, 2, 71], [1] * 200, [130] + [1] * 70):
        run = Run(model, [tokens])
        for size in sizes:
            run.step([size])
        assert error_ratio(run.all_logits(), want) < LIMIT, sizes


def test_sequences_in_one_batch_do_not_see_each_other(tmp_path: Path) -> None:
    model = open_model(write_checkpoint(make_model("v3-like"), tmp_path))
    sequences = [torch.randint(0, model.config.vocab, (n,)) for n in (140, 66, 64, 3, 90)]
    run = Run(model, sequences)
    for rows in ([70, 65, 63, 2, 0], [1, 1, 1, 1, 40], [1, 0, 0, 0, 1], [68, 0, 0, 0, 49]):
        run.step(rows)
    for i, tokens in enumerate(sequences):
        assert error_ratio(run.all_logits(i), whole(model, tokens)) < LIMIT, i


def test_the_model_in_the_box(tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokens = torch.randint(3, theirs.config.vocab_size, (300,))
    assert error_ratio(whole(open_model(TINY), tokens), reference(theirs, tokens)) < LIMIT


def test_greedy_tokens_equal_transformers_generate(tmp_path: Path) -> None:
    theirs = make_model("v3-like")
    model = open_model(write_checkpoint(theirs, tmp_path))
    prompt = torch.randint(2, model.config.vocab, (30,))
    want = theirs.generate(
        prompt[None], attention_mask=torch.ones(1, 30), max_new_tokens=60, do_sample=False, eos_token_id=-1
    )[0]
    tokens = torch.cat((prompt, torch.zeros(60, dtype=torch.int64)))
    run = Run(model, [tokens])
    run.step([30])
    for at in range(30, 90):
        tokens[at] = run.logits[0][-1][-1].argmax()
        if at < 89:
            run.step([1])
    assert tokens.tolist() == want.tolist()


def test_experts_may_be_split_over_shards(tmp_path: Path) -> None:
    folder = write_checkpoint(make_model("v3-like"), tmp_path)
    config, checkpoint = ModelConfig.load(folder), Checkpoint(folder)
    stores = [ExpertStore(config, checkpoint) for _ in range(3)]
    for i, store in enumerate(stores):
        store.load(range(i, config.partitions, 3))

    def compute(layer: int, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        out.zero_()
        part = torch.empty_like(out)
        for store in stores:
            store.compute(layer, x, ids, weights, part)
            out += part

    tokens = torch.randint(0, config.vocab, (90,))
    split = Model(config, load_weights(config, checkpoint), LocalLink(compute))
    assert error_ratio(whole(split, tokens), whole(open_model(folder), tokens)) < LIMIT


def test_a_step_that_lost_a_peer_can_be_run_again(tmp_path: Path) -> None:
    folder = write_checkpoint(make_model("v3-like"), tmp_path)
    model = open_model(folder)
    tokens = torch.randint(0, model.config.vocab, (80,))
    want = whole(model, tokens)
    healthy, last_layer = model.link, model.config.moe_layers[-1]

    class Breaking(LocalLink):
        def dispatch(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> None:
            if layer == last_layer:
                raise PeerLost("shard-0")
            super().dispatch(layer, x, ids, weights)

    run = Run(model, [tokens])
    run.step([70])
    model.link = Breaking(healthy._compute)
    with pytest.raises(PeerLost):
        run.step([10])
    model.link = healthy
    run.step([10])
    assert error_ratio(run.all_logits(), want) < LIMIT


def test_sharded_files_and_tensors_of_extra_layers(tmp_path: Path) -> None:
    theirs = make_model("v3-like")
    folder = write_checkpoint(theirs, tmp_path, max_shard_size="600KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    last = sorted(folder.glob("*.safetensors"))[-1]
    # Multi-token-prediction layers follow the model's own in DeepSeek's files.
    save_file(load_file(last) | {"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}, last)
    tokens = torch.randint(0, theirs.config.vocab_size, (40,))
    assert error_ratio(whole(open_model(folder), tokens), reference(theirs, tokens)) < LIMIT


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_b_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.shared_experts.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_missing_and_misshapen_weights_are_named(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(make_model("v3-like"), tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensor = tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=f"tensor {name} is missing"):
        open_model(folder)
    save_file(tensors | {name: tensor[1:].clone()}, path)
    with pytest.raises(ConfigError, match=f"tensor {name} has shape"):
        open_model(folder)

"""Weights from a checkpoint or from chance, in a CPU's and a GPU's layout: both hold the same numbers."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import common.checkpoint
import common.transfer
from common.checkpoint import Checkpoint
from common.errors import ConfigError
from common.model_config import ModelConfig
from common.random_weights import RandomWeights
from common.source import Read, Source, empty, expert_of, open_source
from common.transfer import Transfer, read_into, transfer
from kernels.experts.work import rows_and_scale
from kernels.mla_prefill import triton as prefill
from kernels.quant import Fp8Blocks, dequantise, quantise_blocks
from services.expert_shard.experts import ExpertStore
from services.expert_shard.stacks import ExpertStack, load_stacks
from services.gpu_worker.actor import check_pages, default_pages
from services.gpu_worker.weights import Layer, Layout, Weights, load_weights
from tests.tiny_models import MODELS, make_model, write_checkpoint

WIDE = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
# Widths that blocks of 128 allow to be joined, with edge blocks wherever they may be.
FP8: dict[str, Any] = dict(
    hidden_size=200, intermediate_size=256, moe_intermediate_size=128, kv_lora_rank=64, q_lora_rank=128,
    qk_nope_head_dim=40, qk_rope_head_dim=24, num_attention_heads=4, num_key_value_heads=4,
)  # fmt: skip
QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
}  # fmt: skip


def write_fp8(name: str, folder: Path, **overrides: Any) -> dict[str, Tensor]:
    """A model of MODELS as DeepSeek publishes fp8; returns its tensors dequantised."""
    write_checkpoint(make_model(name, **FP8 | overrides), folder, published=True)
    change_config(folder, quantization_config=QUANTIZATION)
    tensors = load_file(folder / "model.safetensors")
    kept = dict(tensors)
    for weight, value in kept.items():
        if value.dim() == 2 and not weight.endswith(WIDE):
            blocks = quantise_blocks(value)
            tensors |= {weight: blocks.data, f"{weight}_scale_inv": blocks.scale}
            kept[weight] = dequantise(blocks)
    save_file(tensors, folder / "model.safetensors")
    return kept


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def plain(weight: Tensor | Fp8Blocks) -> Tensor:
    return dequantise(weight) if isinstance(weight, Fp8Blocks) else weight.float()


def numbers(config: ModelConfig, weights: Weights) -> dict[str, Tensor]:
    """Every tensor by name, as float32; of qkv.a and its bias the latent and key first."""
    found: dict[str, Any] = {"embedding": weights.embedding, "norm": weights.norm, "head": weights.head}
    for layer in weights.layers:
        qkv = layer.qkv
        parts = {name: getattr(layer, name) for name in ("attn_norm", "w_uk", "w_uv", "o", "o_bias", "mlp_norm")}
        parts |= {name: getattr(layer, name) for name in ("w_gate", "gate_bias")}
        parts |= {name: getattr(qkv, name) for name in ("kv_norm", "q_norm", "b")}
        parts["a"] = torch.cat(qkv.split(plain(qkv.a), config.latent), 1)
        if qkv.a_bias is not None:
            parts["a_bias"] = torch.cat(qkv.split(qkv.a_bias[None], config.latent), 1)
        if layer.mlp is not None:
            parts |= {"gate_up": layer.mlp.gate_up, "down": layer.mlp.down}
        found |= {f"{layer.index}.{name}": value for name, value in parts.items()}
    return {name: plain(value) for name, value in found.items() if value is not None}


def as_held(config: ModelConfig, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a GPU's layout holds of these: all in bf16, but for the router's bias and what is in blocks."""
    exact = {"gate_bias"} | ({"a", "b", "o", "gate_up", "down"} if config.fp8 else set())
    return {name: v if name.rpartition(".")[2] in exact else v.bfloat16().float() for name, v in values.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape and got[name].equal(value), name


def both_layouts(config: ModelConfig, source: Source) -> tuple[Weights, Weights]:
    return load_weights(config, source), load_weights(config, source, layout=Layout.GPU)


def in_blocks(layer: Layer) -> list[Any]:
    """The weights that an fp8 model has in blocks."""
    mlp = [layer.mlp.gate_up, layer.mlp.down] if layer.mlp else []
    return [layer.qkv.a, layer.o, *mlp, *([] if layer.qkv.b is None else [layer.qkv.b])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_both_layouts_hold_the_same_numbers(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    write_checkpoint(make_model(name).to(dtype), tmp_path)
    config = ModelConfig.load(tmp_path)
    cpu, gpu = both_layouts(config, Checkpoint(tmp_path))
    assert_same(numbers(config, gpu), as_held(config, numbers(config, cpu)))


@pytest.mark.parametrize("name", ["v2-lite-like", "v3-like", "v2-tied"])
def test_a_gpu_s_weights_are_views_of_what_the_file_has(tmp_path: Path, name: str) -> None:
    write_checkpoint(make_model(name), tmp_path)
    config = ModelConfig.load(tmp_path)
    weights = load_weights(config, Checkpoint(tmp_path), layout=Layout.GPU)
    assert weights.embedding.dtype is torch.bfloat16 and weights.head.T.is_contiguous()
    assert (weights.head.data_ptr() == weights.embedding.data_ptr()) is config.tie
    for layer in weights.layers:
        for weight in [*in_blocks(layer), *([] if layer.w_gate is None else [layer.w_gate])]:
            assert weight.dtype is torch.bfloat16 and weight.T.is_contiguous()
        assert layer.attn_norm.dtype is layer.w_uk.dtype is torch.bfloat16
        assert layer.gate_bias is None or layer.gate_bias.dtype is torch.float32
        joint = prefill.joint(layer.w_uk, layer.w_uv)
        want = torch.cat((layer.w_uk, layer.w_uv.mT), 1).flatten(0, 1).T
        assert joint.equal(want)


@pytest.mark.parametrize("name", ["v3-like", "v3-plain", "v2-lite-like", "v2-tied"])
def test_fp8_is_read_as_it_is_or_dequantised(tmp_path: Path, name: str) -> None:
    kept = write_fp8(name, tmp_path)
    config = ModelConfig.load(tmp_path)
    cpu, gpu = (numbers(config, weights) for weights in both_layouts(config, Checkpoint(tmp_path)))
    experts = stored(config, Checkpoint(tmp_path), 2)
    save_file(kept, tmp_path / "model.safetensors")
    wide = load_weights(config, Checkpoint(tmp_path))
    assert_same(cpu, numbers(config, wide))
    want = stored(config, Checkpoint(tmp_path), 2)
    assert experts.gate_up.equal(want.gate_up) and experts.down.equal(want.down)
    assert_same(gpu, as_held(config, cpu))


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("q_lora", [None, 128], ids=["direct", "q_lora"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_rotary_rows_are_paired_up(tmp_path: Path, fp8: bool, q_lora: int | None, layout: Layout) -> None:
    changes = {"attention_bias": True, "q_lora_rank": q_lora, "rope_interleave": False}
    kept = write_fp8("v3-dense", tmp_path, **changes)
    if not fp8:
        kept = {name: value.bfloat16().float() for name, value in kept.items()}
        save_file(kept, tmp_path / "model.safetensors")
        change_config(tmp_path, quantization_config=None)
    config, attention = ModelConfig.load(tmp_path), "model.layers.1.self_attn"
    paired = torch.arange(config.rope).view(2, -1).T.flatten()
    qkv = load_weights(config, Checkpoint(tmp_path), layout=layout).layers[1].qkv

    row, first = qkv.split(plain(qkv.a), config.latent)
    want = kept[f"{attention}.kv_a_proj_with_mqa.weight"]
    assert row.T[: config.kv_lora].equal(want[: config.kv_lora])
    assert row.T[config.kv_lora :].equal(want[config.kv_lora :][paired])
    queries = (first if qkv.b is None else plain(qkv.b)).T.unflatten(0, (config.heads, -1))
    want = kept[f"{attention}.{'q_b_proj' if q_lora else 'q_proj'}.weight"].view_as(queries)
    assert queries[:, : config.nope].equal(want[:, : config.nope])
    assert queries[:, config.nope :].equal(want[:, config.nope :][:, paired])

    assert qkv.a_bias is not None
    row, first = qkv.split(qkv.a_bias[None].float(), config.latent)
    want = kept[f"{attention}.kv_a_proj_with_mqa.bias"].to(qkv.a_bias.dtype).float()
    assert row[0].equal(torch.cat((want[: config.kv_lora], want[config.kv_lora :][paired])))
    want = kept[f"{attention}.q_a_proj.bias"] if q_lora else torch.zeros(first.shape[1])
    assert first[0].equal(want.to(qkv.a_bias.dtype).float())


@pytest.mark.parametrize("name", ["v3-like", "v3-plain"])
def test_blocks_lie_as_in_the_file(tmp_path: Path, name: str) -> None:
    write_fp8(name, tmp_path)
    config = ModelConfig.load(tmp_path)
    for layer in load_weights(config, Checkpoint(tmp_path), layout=Layout.GPU).layers:
        assert layer.qkv.queries_first
        prefill.joint(layer.w_uk, layer.w_uv)
        for weight in in_blocks(layer):
            assert isinstance(weight, Fp8Blocks) and weight.data.dtype is torch.float8_e4m3fn
            assert weight.data.T.is_contiguous() and weight.scale.T.is_contiguous()
            assert weight.scale.shape == tuple(-(-n // 128) for n in weight.data.shape)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"intermediate_size": 144}, r"layers\.0\.mlp\.gate_proj\.weight has 144 rows: in fp8 .* multiple of 128"),
        ({"q_lora_rank": 72}, r"q_a_proj\.weight has 72 rows"),
        ({"qk_nope_head_dim": 112, "q_lora_rank": 128}, "rope_interleave false is not supported where"),
    ],
    ids=["mlp", "q_lora", "rope"],
)
def test_what_does_not_fit_blocks_is_refused(tmp_path: Path, changes: dict[str, int], sentence: str) -> None:
    write_fp8("v3-plain", tmp_path, **changes)
    config, checkpoint = ModelConfig.load(tmp_path), Checkpoint(tmp_path)
    load_weights(config, checkpoint)
    with pytest.raises(ConfigError, match=sentence):
        load_weights(config, checkpoint, layout=Layout.GPU)


def test_a_layer_for_predicting_more_tokens_is_not_read(tmp_path: Path) -> None:
    write_fp8("v3-like", tmp_path)
    config, checkpoint = ModelConfig.load(tmp_path), Checkpoint(tmp_path)
    want = [numbers(config, weights) for weights in both_layouts(config, checkpoint)]
    tensors = load_file(tmp_path / "model.safetensors")
    # Whole numbers: reading one would be refused.
    extra = {f"model.layers.{config.layers}.{part}": torch.arange(4) for part in ("eh_proj.weight", "hnorm.weight")}
    extra |= {n.replace("layers.2.", f"layers.{config.layers}."): torch.arange(4) for n in tensors if "layers.2." in n}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    change_config(tmp_path, num_nextn_predict_layers=1)
    config, checkpoint = ModelConfig.load(tmp_path), Checkpoint(tmp_path)
    assert config.layers == 3 and config.moe_layers == (1, 2)
    for got, numbers_before in zip(both_layouts(config, checkpoint), want, strict=True):
        assert_same(numbers(config, got), numbers_before)
    store = ExpertStore(config, checkpoint)
    store.check()
    store.load(range(config.partitions))


# ---- experts


def stored(config: ModelConfig, source: Source, layer: int) -> Any:
    """The layer as a shard on a CPU holds it."""
    store = ExpertStore(config, source)
    store.load(range(config.partitions))
    return store._layers[layer]


def assert_stack(stack: ExpertStack, gate_up: Tensor, down: Tensor) -> None:
    for weight, want in ((stack.gate_up, gate_up), (stack.down, down)):
        rows_and_scale(weight)  # raises if it is no transposed view
        got = torch.stack([plain(expert_of(weight, slot)) for slot in range(len(want))])
        assert got.shape == want.shape and got.equal(want)


def test_a_stack_holds_the_experts_asked_for_in_order(tmp_path: Path) -> None:
    write_checkpoint(make_model("v3-like").bfloat16(), tmp_path)
    config, checkpoint = ModelConfig.load(tmp_path), Checkpoint(tmp_path)
    want, order = stored(config, checkpoint, 2), [7, 0, 11]
    stack = load_stacks(config, checkpoint, order, "cpu", shared=False, fp8=False)[2]
    assert_stack(stack, want.gate_up[order], want.down[order])
    assert stack.slots.tolist() == [1, 3, 3, 3, 3, 3, 3, 0, 3, 3, 3, 2, 3]
    none = load_stacks(config, checkpoint, [], "cpu", shared=False, fp8=False)[2]
    assert none.gate_up.data.shape == (0, config.hidden, 2 * config.moe_inter)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_shared_experts_come_first_as_experts_of_their_own(tmp_path: Path, fp8: bool, count: int) -> None:
    if fp8:
        write_fp8("v3-like", tmp_path, n_shared_experts=count)
    else:
        write_checkpoint(make_model("v3-like", n_shared_experts=count).bfloat16(), tmp_path)
    config, checkpoint = ModelConfig.load(tmp_path), Checkpoint(tmp_path)
    stack = load_stacks(config, checkpoint, [3, 4], "cpu", shared=True, fp8=fp8)[1]
    routed, mlp = stored(config, checkpoint, 1), load_weights(config, checkpoint).layers[1].mlp
    assert mlp is not None and config.shared_experts == count
    gate, up = plain(mlp.gate_up).chunk(2, 1)
    pairs = zip(gate.chunk(count, 1), up.chunk(count, 1), strict=True)
    gate_up = torch.stack([*(torch.cat(pair, 1) for pair in pairs), *routed.gate_up[[3, 4]]])
    assert_stack(stack, gate_up, torch.stack([*plain(mlp.down).chunk(count), *routed.down[[3, 4]]]))
    held = {12 + i: i for i in range(count)} | {3: count, 4: count + 1}
    assert stack.slots.tolist() == [held.get(i, count + 2) for i in range(12 + count)] + [count + 2]


@pytest.mark.parametrize("chunk", [60_000, 4096], ids=["a block of rows and some of the next", "less than one"])
def test_experts_are_quantised_or_dequantised_while_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(common.checkpoint, "MOST_ASIDE", 100_000)  # an expert at a time
    monkeypatch.setattr(common.transfer, "CHUNK", chunk)
    read_at_a_time = []
    kept = write_fp8("v3-like", tmp_path)
    config, coded = ModelConfig.load(tmp_path), Checkpoint(tmp_path)
    want, every = stored(config, coded, 1), range(config.experts)
    assert_stack(load_stacks(config, coded, every, "cpu", shared=False, fp8=True)[1], want.gate_up, want.down)

    def watched(transfers: list[Transfer], *rest: Any) -> None:
        read_at_a_time.append(sum(one.out.data.nbytes for one in transfers if one.dtype is torch.float8_e4m3fn))
        transfer(transfers, *rest)

    monkeypatch.setattr(common.checkpoint, "transfer", watched)
    dequantised = load_stacks(config, coded, every, "cpu", shared=False, fp8=False)[1]
    assert read_at_a_time == [3 * config.hidden * config.moe_inter] * config.experts * 2  # layers
    assert isinstance(dequantised.gate_up, Tensor) and dequantised.gate_up.dtype is torch.bfloat16
    assert_stack(dequantised, want.gate_up.bfloat16().float(), want.down.bfloat16().float())

    save_file({name: value.bfloat16() for name, value in kept.items()}, tmp_path / "model.safetensors")
    read_at_a_time.clear()
    quantised = load_stacks(config, Checkpoint(tmp_path), every, "cpu", shared=False, fp8=True)[1]
    assert len(read_at_a_time) == 1, "what is quantised needs no memory aside"
    for got, wide in ((quantised.gate_up, want.gate_up), (quantised.down, want.down)):
        assert isinstance(got, Fp8Blocks)
        blocks = quantise_blocks(wide.bfloat16())
        assert torch.equal(got.data.float(), blocks.data.float()) and torch.equal(got.scale, blocks.scale)


def test_experts_in_fp8_need_whole_blocks(tmp_path: Path) -> None:
    write_checkpoint(make_model("v3-like"), tmp_path)
    config, checkpoint = ModelConfig.load(tmp_path), Checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="moe_intermediate_size that is a multiple of 128, not 56"):
        load_stacks(config, checkpoint, [0], "cpu", shared=False, fp8=True)
    assert load_stacks(replace(config, dense_layers=config.layers), checkpoint, [], "cpu", shared=False, fp8=True) == {}


@pytest.mark.parametrize(
    "missing",
    [
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.1.mlp.experts.5.up_proj.weight_scale_inv",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        "model.layers.1.self_attn.kv_b_proj.weight_scale_inv",
        "model.layers.2.self_attn.q_a_layernorm.weight",
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    write_fp8("v3-like", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[missing]
    save_file(tensors, tmp_path / "model.safetensors")
    config, checkpoint = ModelConfig.load(tmp_path), Checkpoint(tmp_path)
    sentence = f"tensor {missing} is missing".replace(".", r"\.")
    if ".experts." in missing or "shared" in missing:
        with pytest.raises(ConfigError, match=sentence):
            load_stacks(config, checkpoint, range(config.experts), "cpu", shared=True, fp8=True)
    if ".experts." in missing:
        with pytest.raises(ConfigError, match=sentence):
            ExpertStore(config, checkpoint).check()
    else:
        for layout in Layout:
            with pytest.raises(ConfigError, match=sentence):
                load_weights(config, checkpoint, layout=layout)


def test_somebody_else_s_shared_experts_are_not_read(tmp_path: Path) -> None:
    write_checkpoint(make_model("v3-like"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "shared" not in n}, tmp_path / "model.safetensors")
    config = ModelConfig.load(tmp_path)
    weights = load_weights(config, Checkpoint(tmp_path), shared=False)
    assert [layer.mlp is None for layer in weights.layers] == [False, True, True]


@pytest.mark.parametrize("layout", Layout)
def test_progress_rises_to_the_whole(tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.transfer, "CHUNK", 60_000)
    write_fp8("v3-like", tmp_path)
    config, checkpoint = ModelConfig.load(tmp_path), Checkpoint(tmp_path)
    told: list[tuple[int, int]] = []
    load_weights(config, checkpoint, layout=layout, progress=lambda *seen: told.append(seen))
    assert len(told) > 10 and told == sorted(told) and told[-1][0] == told[-1][1]
    told.clear()
    load_stacks(config, checkpoint, range(12), "cpu", shared=True, fp8=True, progress=lambda *seen: told.append(seen))
    assert len(told) > 10 and told == sorted(told) and told[-1][0] == told[-1][1]


# ---- chance


@pytest.fixture(params=[False, True], ids=["bf16", "fp8"])
def random_folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Nothing but config.json."""
    write_fp8("v3-like", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if not request.param:
        change_config(tmp_path, quantization_config=None)
    return tmp_path


def test_chance_is_the_same_for_every_actor(random_folder: Path) -> None:
    config = ModelConfig.load(random_folder, "random")
    worker, shard = (open_source(random_folder, config, "random") for _ in range(2))
    cpu, gpu = (numbers(config, weights) for weights in both_layouts(config, worker))
    assert_same(gpu, as_held(config, cpu))
    stack = load_stacks(config, shard, range(12), "cpu", shared=True, fp8=config.fp8)[1]
    want, slots = stored(config, worker, 1), stack.slots.tolist()
    assert plain(expert_of(stack.gate_up, slots[5])).equal(want.gate_up[5])
    gate, up = cpu["1.gate_up"].chunk(2, 1)
    assert plain(expert_of(stack.gate_up, slots[13])).equal(torch.cat((gate.chunk(2, 1)[1], up.chunk(2, 1)[1]), 1))
    assert plain(expert_of(stack.down, slots[13])).equal(cpu["1.down"].chunk(2)[1])


def test_chance_draws_what_it_says(random_folder: Path) -> None:
    config = ModelConfig.load(random_folder, "random")
    source = open_source(random_folder, config, "random")
    drawn = numbers(config, load_weights(config, source))
    for name, value in drawn.items():
        if "norm" in name:
            assert value.eq(1).all(), name
        elif "bias" in name:
            assert value.eq(0).all(), name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(value.mean().item()) < 0.002, name
    assert not drawn["0.o"].equal(drawn["1.o"])
    for name, in_blocks in (("mlp.gate", False), ("self_attn.kv_b_proj", config.fp8)):
        value = source.tensor(f"model.layers.1.{name}.weight", (130, 200))
        assert value.equal(value.bfloat16().float()) is not in_blocks


def test_random_weights_have_a_fingerprint_of_their_own(tmp_path: Path) -> None:
    write_checkpoint(make_model("v3-like"), tmp_path)
    read, drawn = ModelConfig.load(tmp_path), ModelConfig.load(tmp_path, "random")
    assert read.fingerprint != drawn.fingerprint and replace(read, fingerprint=drawn.fingerprint) == drawn
    (tmp_path / "model.safetensors").unlink()
    assert ModelConfig.load(tmp_path, "random") == drawn
    assert ModelConfig.load(tmp_path).fingerprint != drawn.fingerprint
    assert isinstance(open_source(tmp_path, drawn, "random"), RandomWeights)
    with pytest.raises(ConfigError, match=r"holds no \.safetensors file"):
        open_source(tmp_path, read, "checkpoint")


# ---- files into memory


class LateBuffer:
    """As a GPU's: what is begun to be copied is read from memory some time later, in the order of its beginning."""

    made: ClassVar[list[LateBuffer]] = []
    begun: ClassVar[deque[tuple[LateBuffer, Any]]] = deque()

    def __init__(self, size: int) -> None:
        self._bytes = torch.zeros(size, dtype=torch.uint8)
        self.memory = self._bytes.numpy().data
        self._asked = 0
        self.made.append(self)

    def is_late(self) -> bool:
        return any(buffer is self for buffer, _ in self.begun)

    def begin_copy(self, chunk: Any) -> None:
        assert not self.is_late(), "read into before it was copied"
        self.begun.append((self, chunk))
        self._asked = 0

    def copied(self) -> bool:
        self._asked += 1
        if self._asked > 2:
            self.wait()
        return not self.is_late()

    def wait(self) -> None:
        while self.is_late():
            buffer, chunk = self.begun.popleft()
            for at, part in chunk.parts:
                part.put(buffer._bytes[at : at + part.size].view(part.dtype))


def to_gpu(
    transfers: Sequence[Transfer], advance: Callable[[int], None], buffer: type[LateBuffer] = LateBuffer
) -> None:
    LateBuffer.made.clear()
    LateBuffer.begun.clear()
    with ExitStack() as stack:
        chunks = common.transfer._in_order([one for one in transfers if one.size], stack)
        common.transfer._read_ahead(chunks, buffer, advance)
    while LateBuffer.begun:
        LateBuffer.begun[-1][0].wait()


READERS = pytest.mark.parametrize("run", [transfer, to_gpu], ids=["cpu", "gpu"])


@READERS
def test_every_byte_comes_to_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr(common.transfer, "CHUNK", 4096)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
    values = {str(i): torch.randn(37 + 911 * i).to(kinds[i % 5]) for i in range(20)} | {"none": torch.empty(0)}
    save_file(values, tmp_path / "model.safetensors")
    checkpoint, told = Checkpoint(tmp_path), []
    transfers, outs = [], {}
    for i, (name, value) in enumerate(values.items()):
        dtype = torch.bfloat16 if i % 2 and value.dtype is not torch.float8_e4m3fn else value.dtype
        outs[name] = torch.empty(value.shape, dtype=dtype)
        entry, stored_as = checkpoint._checked(name, value.shape)
        transfers.append(Transfer(entry.path, entry.start, stored_as, outs[name]))
    run(transfers, told.append)
    for name, out in outs.items():
        assert torch.equal(out.float(), values[name].to(out.dtype).float()), name
    assert sum(told) == sum(value.nbytes for value in values.values()) and max(told) <= 4096


def test_no_more_buffers_than_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows wider than a buffer get one of their own."""
    monkeypatch.setattr(common.transfer, "CHUNK", 4096)
    weights = torch.randn(300, 200).bfloat16()
    path = tmp_path / "file"
    path.write_bytes(weights.view(torch.uint8).numpy().tobytes())
    to_gpu([Transfer(path, 0, torch.uint8, torch.zeros(3 * 4096, dtype=torch.uint8))], lambda _: None)
    assert [len(buffer.memory) for buffer in LateBuffer.made] == [4096] * 3
    to_gpu([Transfer(path, 0, torch.uint8, torch.zeros(26 * 4096, dtype=torch.uint8))], lambda _: None)
    assert [len(buffer.memory) for buffer in LateBuffer.made] == [4096] * common.transfer.BUFFERS
    blocks = Fp8Blocks.empty((300, 200), "cpu")
    to_gpu([Transfer(path, 0, torch.bfloat16, blocks)], lambda _: None)
    assert [len(buffer.memory) for buffer in LateBuffer.made] == [128 * 200 * 2] * 2 + [44 * 200 * 2]
    want = quantise_blocks(weights)
    assert torch.equal(blocks.data.float(), want.data.float()) and torch.equal(blocks.scale, want.scale)


def pages(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int, read: Callable[[int], None]) -> list[Transfer]:
    """A file of so many chunks; `read` is told of each, by its number, before it is read."""

    def told(view: memoryview, fd: int, path: Path, start: int) -> None:
        read(start // 4096)
        read_into(view, fd, path, start)

    monkeypatch.setattr(common.transfer, "CHUNK", 4096)
    monkeypatch.setattr(common.transfer, "read_into", told)
    (folder / "file").write_bytes(bytes(count * 4096))
    return [Transfer(folder / "file", 0, torch.uint8, torch.ones(count * 4096, dtype=torch.uint8))]


def test_all_threads_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = common.transfer.THREADS
    together = threading.Barrier(threads)
    to_gpu(pages(tmp_path, monkeypatch, 20, lambda i: together.wait(20) if i < threads else None), lambda _: None)


def test_a_buffer_is_read_into_again_while_other_threads_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = threading.Event()

    def read(i: int) -> None:
        if i == common.transfer.BUFFERS:
            again.set()
        assert i or again.wait(20)

    to_gpu(pages(tmp_path, monkeypatch, 40, read), lambda _: None)


def test_a_copy_is_waited_for_only_when_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun_to_read, told = list[int](), list[int]()

    class Never(LateBuffer):
        def copied(self) -> bool:
            return not self.is_late()

        def wait(self) -> None:
            assert self.copied() or len(begun_to_read) == len(told)
            super().wait()

    to_gpu(pages(tmp_path, monkeypatch, 40, begun_to_read.append), told.append, Never)
    assert sorted(begun_to_read) == list(range(40)) and told == [4096] * 40


def test_neighbours_are_read_at_once_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two files of 40 bytes. Nobody asked for 20 to 24; at 31 no float32 may begin in memory."""
    monkeypatch.setattr(common.transfer, "CHUNK", 60)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(range(40)))
    asked = [(0, 3, torch.float32), (12, 4, torch.bfloat16), (24, 7, torch.uint8), (31, 2, torch.float32)]
    transfers = [Transfer(paths[0], start, dtype, torch.zeros(count, dtype=dtype)) for start, count, dtype in asked]
    transfers.append(Transfer(paths[1], 39, torch.uint8, torch.zeros(1, dtype=torch.uint8)))  # the first ends there
    chunks = list(common.transfer._chunks(iter(transfers), dict.fromkeys(paths, 0)))
    assert [(c.path.name, c.start, c.size) for c in chunks] == [
        ("a", 0, 20), ("a", 24, 7), ("a", 31, 8), ("b", 39, 1)
    ]  # fmt: skip
    assert [at for at, _ in chunks[0].parts] == [0, 12]
    told: list[int] = []
    transfer(transfers, told.append)
    assert told == [20, 7, 8, 1]
    for one in transfers:
        assert one.out.data.view(torch.uint8).tolist() == list(range(one.start, one.start + one.size))


def test_a_chunk_ends_where_the_next_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.transfer, "CHUNK", 20)
    two = [Transfer(tmp_path, start, torch.uint8, torch.zeros(n, dtype=torch.uint8)) for start, n in ((0, 12), (12, 9))]
    assert [c.size for c in common.transfer._chunks(iter(two), {tmp_path: 0})] == [12, 9]
    large = Transfer(tmp_path, 0, torch.uint8, torch.zeros(50, dtype=torch.uint8))
    assert [part.size for part in common.transfer._cut(large)] == [20, 20, 10]
    blocks = empty((300, 200), torch.bfloat16, "cpu", fp8=True)
    wide = list(common.transfer._cut(Transfer(tmp_path, 8, torch.bfloat16, blocks)))
    row = 2 * 200  # bytes
    assert [(part.start - 8, part.size) for part in wide] == [
        (0, 128 * row), (128 * row, 128 * row), (256 * row, 44 * row)
    ]  # fmt: skip
    monkeypatch.setattr(common.transfer, "CHUNK", 299 * row)
    wide = list(common.transfer._cut(Transfer(tmp_path, 8, torch.bfloat16, blocks)))
    assert [part.size for part in wide] == [256 * row, 44 * row]


@READERS
def test_a_file_that_ends_early_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr(common.transfer, "CHUNK", 4096)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    cut.write_bytes(bytes(100))
    whole.write_bytes(bytes(1 << 24))
    transfers = [Transfer(path, 0, torch.float32, torch.empty(1 << 22)) for path in (cut, whole)]
    transfers[0] = replace(transfers[0], out=torch.empty(1000))
    told: list[int] = []
    with pytest.raises(ConfigError, match="cut ends too early"):
        run(transfers, told.append)
    assert sum(told) < 1 << 24
    assert not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]


@READERS
def test_a_failure_keeps_nothing_of_what_was_loaded(tmp_path: Path, run: Any) -> None:
    (tmp_path / "cut").write_bytes(bytes(100))
    transfers = [Transfer(tmp_path / "cut", 0, torch.float32, torch.empty(1000))]
    kept = weakref.ref(transfers[0].out)
    gc.disable()  # a cycle would keep a model's weights until it runs
    try:
        with pytest.raises(ConfigError, match="cut ends too early"):
            run(transfers, lambda _: None)
        transfers.clear()
        assert kept() is None
    finally:
        gc.enable()


def test_files_that_cannot_be_read_are_named_and_nothing_is_no_work(tmp_path: Path) -> None:
    gone = Transfer(tmp_path / "gone", 0, torch.float32, torch.empty(1))
    with pytest.raises(ConfigError, match="gone cannot be read: No such file"):
        transfer([gone], print)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        transfer([replace(gone, path=tmp_path)], print)
    transfer([], print)
    transfer([replace(gone, out=torch.empty(0))], print)


def test_eight_bits_without_scales_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(130, 3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="tensor w_scale_inv is missing"):
        checkpoint.tensor("w")
    save_file(
        {"w": torch.ones(130, 3).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 1)},
        tmp_path / "model.safetensors",
    )
    for out in (torch.empty(130, 3), empty((130, 3), torch.float32, "cpu", fp8=True)):
        with pytest.raises(ConfigError, match=r"w_scale_inv has shape \[1, 1\], expected \[2, 1\]"):
            Checkpoint(tmp_path).fill([Read("w", out)])


def test_a_kv_cache_larger_than_the_machine_is_told() -> None:
    config = ModelConfig.load(Path("models/tiny"))
    check_pages(config, default_pages(config))
    with pytest.raises(
        ConfigError, match=r"MOECULE_KV_PAGES is 16777216: .* takes \d+\.\d GB, .* which holds \d+ pages"
    ):
        check_pages(config, 1 << 24)

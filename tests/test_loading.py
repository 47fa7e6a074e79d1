"""Weights from a checkpoint or from chance, in a CPU's and a GPU's layout: both hold the same numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from common.transfer import Transfer, transfer
from kernels.experts.work import rows_and_scale
from kernels.mla_prefill import triton as prefill
from kernels.quant import Fp8Blocks, dequantise, quantise_blocks
from services.expert_shard.experts import ExpertStore
from services.expert_shard.stacks import ExpertStack, load_stack
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


def numbers(weights: Weights) -> dict[str, Tensor]:
    """Every tensor by name, as float32; columns of qkv.a with the latent first."""
    found = {"embedding": weights.embedding, "norm": weights.norm, "head": weights.head}
    for layer in weights.layers:
        for name in ("attn_norm", "w_uk", "w_uv", "o", "o_bias", "mlp_norm", "w_gate", "gate_bias"):
            found[f"{layer.index}.{name}"] = getattr(layer, name)
        for name in ("kv_norm", "q_norm", "b"):
            found[f"{layer.index}.{name}"] = getattr(layer.qkv, name)
        width = len(layer.qkv.kv_norm) + 2 * ROPE_HALF[0]
        for name in ("a", "a_bias"):
            if (value := getattr(layer.qkv, name)) is not None:
                value = plain(value)
                row, queries = layer.qkv.split(value if value.dim() == 2 else value[None], width)
                found[f"{layer.index}.{name}"] = torch.cat((row, queries), 1)
        if layer.mlp is not None:
            found |= {f"{layer.index}.gate_up": layer.mlp.gate_up, f"{layer.index}.down": layer.mlp.down}
    return {name: plain(value) for name, value in found.items() if value is not None}

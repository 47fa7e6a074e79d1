"""Small random checkpoints, made and written by transformers, so that code which is not ours says what is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

COMMON: dict[str, Any] = dict(
    vocab_size=331,
    hidden_size=200,
    intermediate_size=144,
    moe_intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=5,
    num_key_value_heads=5,
    first_k_dense_replace=1,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_shared_experts=2,
    q_lora_rank=72,
    kv_lora_rank=96,
    qk_nope_head_dim=24,
    qk_rope_head_dim=20,
    v_head_dim=28,
    max_position_embeddings=640,
    initializer_range=0.08,
    bos_token_id=0,
    eos_token_id=1,
)
YARN = dict(
    rope_type="yarn", rope_theta=5000.0, factor=10.0, original_max_position_embeddings=64, beta_fast=8, beta_slow=1
)

MODELS: dict[str, dict[str, Any]] = {
    "v2-lite-like": dict(
        v=2, q_lora_rank=None, topk_method="greedy", rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707)
    ),
    "v2-like": dict(
        v=2,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=16.0,
        rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.0),
    ),
    "v2-tied": dict(v=2, q_lora_rank=None, tie_word_embeddings=True, attention_bias=True, n_shared_experts=1),
    "v3-like": dict(
        v=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
    ),
    "v3-plain": dict(
        v=3, n_group=1, topk_group=1, q_lora_rank=None, norm_topk_prob=False, rope_interleave=False, eos_token_id=[1, 5]
    ),
    "v3-dense": dict(v=3, n_group=1, topk_group=1, first_k_dense_replace=3, attention_bias=True),
}


def make_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of MODELS in float32, no weight at the value it would have by default."""
    fields = COMMON | MODELS[name] | overrides
    config_class, model_class = {
        2: (DeepseekV2Config, DeepseekV2ForCausalLM),
        3: (DeepseekV3Config, DeepseekV3ForCausalLM),
    }[fields.pop("v")]
    torch.manual_seed(seed)
    model = model_class(config_class(**fields)).eval()
    with torch.no_grad():
        for parameter_name, value in [*model.named_parameters(), *model.named_buffers()]:
            if parameter_name.endswith("e_score_correction_bias"):
                value.uniform_(-0.2, 0.2)
            elif "norm" in parameter_name or parameter_name.endswith("bias"):
                value += 0.2 * torch.randn_like(value)
    return model


def write_checkpoint(model: PreTrainedModel, folder: Path, *, published: bool = False, **save: Any) -> Path:
    """`published`: config.json with the words of DeepSeek's own files (rope_scaling, topk_method ...)."""
    model.save_pretrained(folder, **save)
    if published:
        path = folder / "config.json"
        path.write_text(json.dumps(as_published(json.loads(path.read_text()))))
    return folder


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    v3 = config["model_type"] == "deepseek_v3"
    if v3:
        config |= {"topk_method": "noaux_tc"}
        if config["rope_interleave"]:
            del config["rope_interleave"]  # DeepSeek's own files do not say it
    config |= {"scoring_func": "sigmoid" if v3 else "softmax", "moe_layer_freq": 1, "ep_size": 1}
    for name in ("head_dim", "qk_head_dim", "dtype", "transformers_version"):
        config.pop(name, None)
    return config | {"torch_dtype": "float32"}

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.model_config import ModelConfig

# The fields that matter of config.json as DeepSeek publishes DeepSeek-V3 and DeepSeek-V2-Lite.
V3: dict[str, Any] = json.loads("""{
  "architectures": ["DeepseekV3ForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3,
  "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
  "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
  "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                   "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
  "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280}""")
V2_LITE: dict[str, Any] = V3 | json.loads("""{
  "architectures": ["DeepseekV2ForCausalLM"], "bos_token_id": 100000, "eos_token_id": 100001,
  "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
  "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16,
  "num_experts_per_tok": 6, "num_hidden_layers": 27, "q_lora_rank": null, "routed_scaling_factor": 1.0,
  "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                   "original_max_position_embeddings": 4096, "type": "yarn"}}""")

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def load(folder: Path, fields: dict[str, Any], **changes: Any) -> ModelConfig:
    fields = {name: value for name, value in (fields | changes).items() if value != "missing"}
    (folder / "config.json").write_text(json.dumps(fields))
    return ModelConfig.load(folder)


def test_deepseek_v3_as_published(tmp_path: Path) -> None:
    config = load(tmp_path, V3)
    assert (config.hidden, config.layers, config.heads, config.q_lora, config.latent) == (7168, 61, 128, 1536, 576)
    assert (config.scoring, config.topk_method, config.norm_topk) == ("sigmoid", "noaux_tc", True)
    assert (config.topk, config.groups, config.topk_groups, config.routed_scale) == (8, 8, 4, 2.5)
    assert config.nextn_layers == 1
    assert config.moe_layers == tuple(range(3, 61))
    assert config.partitions == 64
    assert config.yarn is not None and config.yarn.attention_factor == 1.0
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_deepseek_v2_lite_as_published(tmp_path: Path) -> None:
    config = load(tmp_path, V2_LITE)
    assert (config.q_lora, config.shared_experts, config.partitions) == (0, 2, 64)
    assert (config.scoring, config.topk_method, config.norm_topk) == ("softmax", "greedy", False)
    assert config.moe_layers == tuple(range(1, 27))
    assert config.bos_id == 100000 and config.eos_ids == (100001,)


@pytest.mark.parametrize("fields", [V3, V2_LITE], ids=["v3", "v2-lite"])
def test_both_spellings_of_rope_mean_the_same(tmp_path: Path, fields: dict[str, Any]) -> None:
    scaling = dict(fields["rope_scaling"])
    parameters = scaling | {"rope_type": scaling.pop("type"), "rope_theta": 10000.0}
    published = load(tmp_path, fields)
    rewritten = load(tmp_path, fields, rope_scaling="missing", rope_theta="missing", rope_parameters=parameters)
    assert replace(rewritten, fingerprint="") == replace(published, fingerprint="")


def test_fp8_as_deepseek_publishes_it(tmp_path: Path) -> None:
    assert load(tmp_path, V3, quantization_config=FP8).fp8
    assert load(tmp_path, V3, quantization_config=FP8 | {"scale_fmt": "ue8m0"}).fp8
    assert not load(tmp_path, V3).fp8
    assert not load(tmp_path, V3, quantization_config=None).fp8


def test_end_tokens_of_both_files_once_each(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1, 9]}')
    assert load(tmp_path, V3).eos_ids == (7, 1, 9)
    assert load(tmp_path, V3, eos_token_id=[2, 9]).eos_ids == (7, 1, 9, 2)
    (tmp_path / "generation_config.json").write_text("{}")
    assert load(tmp_path, V3, eos_token_id=None).eos_ids == ()


def test_without_experts_every_layer_is_dense(tmp_path: Path) -> None:
    config = load(tmp_path, V3, n_routed_experts=None)
    assert config.moe_layers == () and config.experts == 0


def test_sparse_layers_at_intervals(tmp_path: Path) -> None:
    assert load(tmp_path, V3, moe_layer_freq=2, num_hidden_layers=9).moe_layers == (4, 6, 8)


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"12345")
    first = load(one, V3).fingerprint
    assert load(two, dict(reversed(V3.items()))).fingerprint == first
    assert load(two, V3, vocab_size=7).fingerprint != first
    (two / "model.safetensors").write_bytes(b"123456")
    assert load(two, V3).fingerprint != first


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM is not supported"),
        ({"architectures": "missing"}, "field architectures is missing"),
        ({"kv_lora_rank": "missing"}, "field kv_lora_rank is missing"),
        ({"hidden_size": "wide"}, "field hidden_size is 'wide', expected a whole number"),
        ({"hidden_size": True}, "field hidden_size is True, expected a whole number"),
        ({"num_hidden_layers": 0}, "field num_hidden_layers is 0, expected a positive number"),
        ({"eos_token_id": "x"}, "field eos_token_id is 'x', expected token ids"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "RoPE of type linear is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "field factor of the YaRN RoPE is missing"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .* is not supported"),
        ({"quantization_config": FP8 | {"quant_method": "awq"}}, "quantization_config .*awq.* is not supported"),
        ({"quantization_config": FP8 | {"weight_block_size": [1, 128]}}, r"quantization_config .*\[1, 128\].* is not"),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "quantization_config .*e5m2.* is not supported"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "quantization_config .*static.* is not"),
        ({"scoring_func": "softmax"}, "topk_method noaux_tc with scoring_func softmax is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"n_group": 7}, "n_routed_experts 256 is no multiple of n_group 7"),
        ({"topk_group": 9}, "topk_group 9 is more than n_group 8"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than the 128 reachable experts"),
        ({"qk_rope_head_dim": 63}, "an odd qk_rope_head_dim"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_served_is_named(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(tmp_path, V3, **changes)
    assert "config.json" in caught.value.message


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: No such file"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        ModelConfig.load(tmp_path)


def test_reading_a_configuration_does_not_import_torch() -> None:
    code = "import sys, common.model_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What a checkpoint folder says about its model: DeepSeek's own config.json or the one transformers 5 writes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError

ARCHITECTURES = {"DeepseekV2ForCausalLM": "v2", "DeepseekV3ForCausalLM": "v3"}


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """RoPE stretched from `original` positions to `factor` times as many."""

    factor: float
    original: int
    beta_fast: float
    beta_slow: float
    attention_factor: float  # multiplies cos and sin
    softmax_factor: float  # multiplies the softmax scale
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    architecture: str  # "v2" or "v3"
    hidden: int
    layers: int
    heads: int
    vocab: int
    q_lora: int  # 0: queries are projected directly
    kv_lora: int
    nope: int
    rope: int
    v_dim: int
    inter: int
    moe_inter: int
    experts: int  # 0: every layer is dense
    shared_experts: int
    topk: int
    groups: int
    topk_groups: int
    scoring: str  # "softmax" or "sigmoid"
    topk_method: str  # "greedy", "group_limited_greedy" or "noaux_tc"
    norm_topk: bool
    routed_scale: float
    dense_layers: int
    moe_layer_freq: int
    eps: float
    rope_theta: float
    rope_interleave: bool  # pairs are (0, 1), (2, 3) ... in the file, else (0, rope / 2), (1, rope / 2 + 1) ...
    yarn: Yarn | None
    tie: bool
    attention_bias: bool
    max_positions: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    fp8: bool  # the file's linear weights are e4m3 with one scale a block of 128x128
    fingerprint: str  # of config.json and the weight files' names and sizes, or of config.json and "random"
    nextn_layers: int = 0  # in the file beside `layers`: they predict several tokens (MTP), and are not read

    def context_within(self, limit: int) -> int:
        """The longest prompt plus output, in tokens, under the setting max_context (0: the model's own)."""
        return min(limit or self.max_positions, self.max_positions)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        if not self.experts:
            return ()
        return tuple(i for i in range(self.dense_layers, self.layers) if i % self.moe_layer_freq == 0)

    @property
    def partitions(self) -> int:
        """A partition is the experts with the same id modulo this, over all layers."""
        return self.experts if self.experts <= 64 else 64

    def experts_of(self, partitions: Iterable[int]) -> list[int]:
        return sorted(e for p in partitions for e in range(p, self.experts, self.partitions))

    @property
    def latent(self) -> int:
        """Width of a KV cache row: the normed latent, then the rotated key."""
        return self.kv_lora + self.rope

    @property
    def softmax_scale(self) -> float:
        scale = (self.nope + self.rope) ** -0.5
        return scale * self.yarn.softmax_factor if self.yarn else scale

    @classmethod
    def load(cls, folder: str | Path, weights: str = "checkpoint") -> ModelConfig:
        """`weights`: the setting of that name. Raises ConfigError that names what is missing, malformed or not
        supported."""
        folder = Path(folder)
        config = _Fields(folder / "config.json")
        architecture = _architecture(config)
        moe = _moe_fields(config, architecture)
        loaded = cls(
            architecture=architecture,
            hidden=config.count("hidden_size"),
            layers=config.count("num_hidden_layers"),
            heads=config.count("num_attention_heads"),
            vocab=config.count("vocab_size"),
            q_lora=config.count("q_lora_rank", 0),
            kv_lora=config.count("kv_lora_rank"),
            nope=config.count("qk_nope_head_dim"),
            rope=config.count("qk_rope_head_dim"),
            v_dim=config.count("v_head_dim"),
            inter=config.count("intermediate_size"),
            eps=config.number("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(config),
            rope_interleave=architecture == "v2" or config.flag("rope_interleave", True),
            yarn=_yarn(config),
            tie=config.flag("tie_word_embeddings", False),
            attention_bias=config.flag("attention_bias", False),
            max_positions=config.count("max_position_embeddings"),
            eos_ids=_eos_ids(folder, config),
            bos_id=config.optional_id("bos_token_id"),
            fp8=_fp8(config),
            fingerprint=_fingerprint(folder, weights),
            nextn_layers=config.count("num_nextn_predict_layers", 0),
            **moe,
        )
        _check(loaded, config)
        return loaded


class _Fields:
    """A JSON object read field by field; null counts as missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = _read_object(path)

    def get(self, name: str, kinds: tuple[type, ...], word: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.path}: field {name} is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{self.path}: field {name} is {value!r}, expected {word}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name, (int,), "a whole number", default)
        if value < 0 or (value == 0 and default is None):
            raise ConfigError(f"{self.path}: field {name} is {value}, expected a positive number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        return float(self.get(name, (int, float), "a number", default))

    def flag(self, name: str, default: bool) -> bool:
        return self.get(name, (bool,), "true or false", default)

    def text(self, name: str, default: str) -> str:
        return self.get(name, (str,), "a string", default)

    def object(self, name: str) -> dict[str, Any]:
        return self.get(name, (dict,), "an object", {})

    def optional_id(self, name: str) -> int | None:
        value = self.get(name, (int,), "a token id", -1)
        return None if value < 0 else value

    def ids(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int for i in ids):
            raise ConfigError(f"{self.path}: field {name} is {value!r}, expected token ids")
        return tuple(ids)

    def unsupported(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: {what} is not supported")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return values


def _architecture(config: _Fields) -> str:
    names = config.get("architectures", (list,), "a list", None)
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise config.unsupported(f"architecture {', '.join(map(str, names)) or '(none)'}")


def _moe_fields(config: _Fields, architecture: str) -> dict[str, Any]:
    """The router as transformers computes it: V2 never normalises the weights (DeepSeek's own code does so where
    norm_topk_prob is set, which no published V2 does), and V3 is always sigmoid with noaux_tc."""
    v3 = architecture == "v3"
    experts = config.count("n_routed_experts", 0)
    grouped = {"n_group": config.count("n_group", 1) or 1, "topk_group": config.count("topk_group", 1) or 1}
    return dict(
        moe_inter=config.count("moe_intermediate_size") if experts else 0,
        experts=experts,
        shared_experts=config.count("n_shared_experts", 0) if experts else 0,
        topk=config.count("num_experts_per_tok") if experts else 0,
        groups=grouped["n_group"],
        topk_groups=grouped["topk_group"],
        scoring=config.text("scoring_func", "sigmoid" if v3 else "softmax"),
        topk_method=config.text("topk_method", "noaux_tc" if v3 else "greedy"),
        norm_topk=v3 and config.flag("norm_topk_prob", True),
        routed_scale=config.number("routed_scaling_factor", 2.5 if v3 else 1.0),
        dense_layers=config.count("first_k_dense_replace", 3 if v3 else 0),
        moe_layer_freq=config.count("moe_layer_freq", 1) or 1,
    )


def _rope_fields(config: _Fields) -> dict[str, Any]:
    return config.object("rope_parameters") or config.object("rope_scaling")


def _rope_theta(config: _Fields) -> float:
    theta = _rope_fields(config).get("rope_theta")
    return config.number("rope_theta", 10000.0) if theta is None else float(theta)


def _yarn(config: _Fields) -> Yarn | None:
    fields = _rope_fields(config)
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise config.unsupported(f"RoPE of type {kind}")
    for name in ("factor", "original_max_position_embeddings"):
        if not isinstance(fields.get(name), int | float):
            raise ConfigError(f"{config.path}: field {name} of the YaRN RoPE is missing")
    factor = float(fields["factor"])
    mscale, all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
    attention_factor = fields.get("attention_factor")
    if attention_factor is None:
        ratio = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else None
        attention_factor = _mscale(factor, 1.0) if ratio is None else ratio
    return Yarn(
        factor=factor,
        original=int(fields["original_max_position_embeddings"]),
        beta_fast=float(fields.get("beta_fast") or 32),
        beta_slow=float(fields.get("beta_slow") or 1),
        attention_factor=float(attention_factor),
        softmax_factor=_mscale(factor, all_dim) ** 2 if all_dim else 1.0,
        truncate=bool(fields.get("truncate", True)),
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _eos_ids(folder: Path, config: _Fields) -> tuple[int, ...]:
    """generation_config.json's list first: it is what generate() stops at."""
    path = folder / "generation_config.json"
    ids = _Fields(path).ids("eos_token_id") if path.exists() else ()
    return tuple(dict.fromkeys(ids + config.ids("eos_token_id")))


def _fp8(config: _Fields) -> bool:
    found = config.object("quantization_config")
    wanted = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    said = {"fmt": "e4m3", "activation_scheme": "dynamic"} | found
    if found and any(said.get(name) != value for name, value in wanted.items()):
        raise config.unsupported(f"quantization_config {found} (fp8 in blocks of 128x128, bf16, fp16 and fp32 are)")
    return bool(found)


def _fingerprint(folder: Path, weights: str) -> str:
    """Equal for equal checkpoints wherever they lie; the weights themselves are not read."""
    config = json.dumps(_read_object(folder / "config.json"), sort_keys=True)
    files: Any = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
    if weights == "random":
        files = weights
    return hashlib.blake2b(f"{config}{files}".encode(), digest_size=8).hexdigest()


def _check(model: ModelConfig, config: _Fields) -> None:
    if config.flag("mlp_bias", False):
        raise config.unsupported("mlp_bias")
    if (act := config.text("hidden_act", "silu")) != "silu":
        raise config.unsupported(f"hidden_act {act}")
    for name, value in [("qk_nope_head_dim", model.nope), ("qk_rope_head_dim", model.rope),
                        ("q_lora_rank", model.q_lora), ("kv_lora_rank", model.kv_lora)]:  # fmt: skip
        if value % 2:
            raise config.unsupported(f"an odd {name} ({value})")
    if model.experts:
        _check_router(model, config)


def _check_router(model: ModelConfig, config: _Fields) -> None:
    known = {"v2": [("softmax", "greedy"), ("softmax", "group_limited_greedy")], "v3": [("sigmoid", "noaux_tc")]}
    if (model.scoring, model.topk_method) not in known[model.architecture]:
        raise config.unsupported(f"topk_method {model.topk_method} with scoring_func {model.scoring}")
    if model.experts % model.groups:
        raise ConfigError(f"{config.path}: n_routed_experts {model.experts} is no multiple of n_group {model.groups}")
    grouped = model.topk_method != "greedy"
    reachable = model.topk_groups * (model.experts // model.groups) if grouped else model.experts
    if model.topk > reachable:
        raise ConfigError(
            f"{config.path}: num_experts_per_tok {model.topk} is more than the {reachable} reachable experts"
        )
    if grouped and model.topk_groups > model.groups:
        raise ConfigError(f"{config.path}: topk_group {model.topk_groups} is more than n_group {model.groups}")

"""config.json of published models, as far as their shapes go, and a tokenizer, for runs with random weights.

python -m benchmarks.shapes v2-lite FOLDER [--layers N]
MOECULE_MODEL=FOLDER MOECULE_WEIGHTS=random python -m common.serve
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
_ATTENTION = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840, "rope_theta": 10000, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": False, "moe_layer_freq": 1, "torch_dtype": "bfloat16",
}  # fmt: skip

V2_LITE: dict[str, Any] = _ATTENTION | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "bos_token_id": 100000,
    "eos_token_id": 100001, "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip

R1: dict[str, Any] = _ATTENTION | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "bos_token_id": 0,
    "eos_token_id": 1, "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    },
}  # fmt: skip

SHAPES = {"v2-lite": V2_LITE, "r1": R1}


def write_config(shape: str, layers: int, folder: Path) -> Path:
    """`layers` 0: all of them."""
    config = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_model(shape: str, layers: int, folder: Path) -> Path:
    """All that a cluster with random weights needs."""
    write_config(shape, layers, folder)
    write_tokenizer(SHAPES[shape]["vocab_size"], folder)
    return folder


def in_blocks(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """As DeepSeek publishes them in fp8: matrices in blocks, but for those that it keeps wide, and their scales."""
    from common.checkpoint import SCALES
    from common.random_weights import KEPT_WIDE
    from kernels.quant import quantise_blocks

    for name, value in tensors:
        if value.dim() == 2 and not name.endswith(KEPT_WIDE):
            blocks = quantise_blocks(value)
            yield name, blocks.data
            yield name + SCALES, blocks.scale
        else:
            yield name, value


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A byte-level one in which every id shows a text: invented words, and the 256 bytes at the end, where no published
    shape has its special tokens. There are none, so that a stream of random ids shows something with each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    words = ["\u0120" + "".join(word) for word in itertools.islice(letters, vocabulary - len(alphabet))]
    entries = {entry: i for i, entry in enumerate(words + alphabet)}
    assert len(entries) == vocabulary, f"no tokenizer has {vocabulary} entries here"
    # Without merges: a word is found as a whole, anything else becomes bytes.
    tokenizer = Tokenizer(models.BPE(vocab=entries, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=0, help="0: all; the first ones are dense")
    options = parser.parse_args()
    write_model(options.shape, options.layers, options.folder)


if __name__ == "__main__":
    main()

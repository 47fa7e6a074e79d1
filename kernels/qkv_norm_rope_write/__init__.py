"""From the hidden state to queries, and the new rows of the latent KV cache."""

from kernels.qkv_norm_rope_write.naive import QkvWeights, qkv_norm_rope_write

__all__ = ["QkvWeights", "qkv_norm_rope_write"]

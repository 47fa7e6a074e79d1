"""Latent attention of a chunk of one prompt over the paged cache."""

from kernels.mla_prefill.naive import mla_prefill

__all__ = ["mla_prefill"]

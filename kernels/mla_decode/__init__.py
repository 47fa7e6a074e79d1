"""Latent attention of one new token a sequence over the paged cache."""

from kernels.mla_decode.naive import mla_decode

__all__ = ["mla_decode"]

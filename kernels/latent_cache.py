"""The fp8 form of the paged latent cache: its bytes, as views.

A page of 64 tokens is one row of a uint8 tensor [pages, page_bytes(kv_lora, rope)], three planes one after another, so
that each is dense and starts on 128 bytes (FlashMLA keeps the same 656 bytes a token for 512 + 64, but interleaved):

    64 x kv_lora          the normed latent as e4m3, token by token
    64 x kv_lora/128 x 4  float32 scales, one for each 128 columns of a token: latent = e4m3 * scale
    64 x rope x 2         the rotated key, bfloat16 as in the plain cache: rotation makes its columns uneven, and it is
                          an eighth of the row
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.pages import PAGE
from kernels.quant.naive import GROUP, Fp8Rows, dequantise


@dataclass(frozen=True)
class Fp8Latent:
    """One layer's pages. What takes a plain cache, [pages, PAGE, kv_lora + rope], takes this in its stead."""

    data: Tensor  # e4m3 [pages, PAGE, kv_lora]
    scale: Tensor  # float32 [pages, PAGE, kv_lora / GROUP]
    rope: Tensor  # bfloat16 [pages, PAGE, rope]

    @staticmethod
    def of(pages: Tensor, kv_lora: int, rope: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Fp8Latent:
        """Views of `pages`, uint8 [pages, page_bytes(kv_lora, rope)]; `dtype` is the target's e4m3."""
        count = len(pages)
        planes = pages.split((PAGE * kv_lora, PAGE * kv_lora // GROUP * 4, PAGE * rope * 2), 1)
        data, scale, turned = (
            plane.view(kind).unflatten(1, (PAGE, -1))
            for plane, kind in zip(planes, (dtype, torch.float32, torch.bfloat16), strict=True)
        )
        assert data.shape == (count, PAGE, kv_lora)
        return Fp8Latent(data, scale, turned)

    def rows(self) -> Tensor:
        """float32 [pages, PAGE, kv_lora + rope], as the plain cache would hold it."""
        return torch.cat((dequantise(Fp8Rows(self.data, self.scale)), self.rope.float()), 2)


def page_bytes(kv_lora: int, rope: int) -> int:
    return PAGE * (kv_lora + kv_lora // GROUP * 4 + rope * 2)

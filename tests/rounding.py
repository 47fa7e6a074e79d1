"""What a number format costs by itself: the CPU's float32 model with values rounded where the GPU's are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import kernels.qkv_norm_rope_write.naive as qkv
import services.gpu_worker.model as model
from kernels.quant import GROUP, Fp8Rows, dequantise, quantise_rows


def to_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def to_fp8(x: Tensor) -> Tensor:
    coded = Fp8Rows.empty(len(x), x.shape[1], "cpu")
    quantise_rows(x.contiguous(), coded)
    return dequantise(coded)


@contextmanager
def rounded(*, cache: bool = False, rows: bool = False) -> Iterator[None]:
    """The residual stream and what enters a product in bf16, or with `rows` in fp8 but for the head's; with `cache` the
    latents in fp8. (What experts compute between their two products is not rounded here.)"""
    norm, product, write = model.combine_norm, model.linear, qkv._write
    enter = to_fp8 if rows else to_bf16

    def rounded_norm(h: Tensor, parts: Any, weight: Tensor, eps: float, out: Tensor, coded: None = None) -> None:
        h.copy_(to_bf16(h))
        norm(h, parts, weight, eps, out)
        out.copy_(enter(out))

    def rounded_product(x: Tensor, w: Tensor, out: Tensor, *, add: Tensor | None = None, scratch: Any = None) -> None:
        product(enter(x) if add is not None else to_bf16(x), w, out, add=add)

    def rounded_write(row: Tensor, at: Tensor, pages: Tensor) -> None:
        kv_lora = row.shape[1] // GROUP * GROUP
        latent, key = row.split((kv_lora, row.shape[1] - kv_lora), 1)
        write(torch.cat((to_fp8(latent) if cache else to_bf16(latent), to_bf16(key)), 1), at, pages)

    model.combine_norm, model.linear = rounded_norm, rounded_product  # type: ignore[assignment]
    qkv._write = rounded_write  # type: ignore[assignment]
    try:
        yield
    finally:
        model.combine_norm, model.linear, qkv._write = norm, product, write

from __future__ import annotations

import torch

from benchmarks.kernels import KernelCase, Launch
from kernels.quant.naive import Fp8Rows, dequantise
from kernels.quant.triton import quantise_rows
from tests.kernel_checks import error_ratio

L2 = 64 << 20


def inputs(tokens: int, width: int) -> list[torch.Tensor]:
    """Activations of decode are warm in the engine; those of a prefill are not."""
    sets = 8 if tokens <= 64 else max(2, 2 * L2 // (2 * tokens * width))
    return [torch.randn(tokens, width, device="cuda").bfloat16() for _ in range(sets)]


def case(tokens: int, width: int) -> KernelCase:
    def make(tile: dict | None) -> list[Launch]:
        def one(x: torch.Tensor) -> Launch:
            out = Fp8Rows.empty(tokens, width, "cuda")
            return lambda: quantise_rows(x, out)

        return [one(x) for x in inputs(tokens, width)]

    def vllm() -> list[Launch]:
        from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

        return [lambda x=x: per_token_group_quant_fp8(x, 128) for x in inputs(tokens, width)]  # type: ignore[misc]

    def check() -> float:
        x, out = inputs(tokens, width)[0], Fp8Rows.empty(tokens, width, "cuda")
        quantise_rows(x, out)
        return error_ratio(dequantise(out), x)

    moved = tokens * width * (2 + 1 + 4 / 128)
    shape = f"{width} bf16, {tokens} tokens"
    return KernelCase("quantise_rows", shape, make, bytes=moved, check=check, peers={"vLLM": vllm})


def cases() -> list[KernelCase]:
    return [case(tokens, width) for width in (7168, 1536) for tokens in (1, 64, 4096)]

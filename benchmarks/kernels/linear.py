from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels import KernelCase, Launch
from kernels.linear import LinearScratch, library, naive
from kernels.linear.candidates import candidates
from kernels.linear.triton import linear, shape_name
from kernels.quant.naive import GROUP, Fp8Blocks, Fp8Rows, dequantise, quantise_blocks, quantise_rows
from tests.kernel_checks import error_ratio

L2 = 64 << 20
R1 = [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168)]
V2_LITE = [(3072, 2048), (576, 2048), (2048, 2048), (10944, 2048)]
DEEPGEMM = {  # us at 64 and 4,096 tokens, of ../shared/anchors.md
    (2112, 7168): (10.8, 111.9),
    (24576, 1536): (11.5, 276.8),
    (7168, 16384): (38.4, 763.4),
    (4096, 7168): (11.7, 199.0),
}
Operands = tuple[Fp8Rows, Fp8Blocks, Tensor]


def copies(size: int) -> int:
    """Enough weights that none is still in the L2 when its turn comes again."""
    return max(2, 2 * L2 // size + 1)


def fp8_operands(tokens: int, n: int, k: int) -> list[Operands]:
    def one() -> Operands:
        x, w = Fp8Rows.empty(tokens, k, "cuda"), torch.randn(n, k, device="cuda").bfloat16()
        quantise_rows(torch.randn(tokens, k, device="cuda").bfloat16(), x)
        return x, quantise_blocks(w.T), torch.empty(tokens, n, device="cuda", dtype=torch.bfloat16)

    return [one() for _ in range(copies(n * k))]


def each(
    tokens: int, n: int, k: int, bind: Callable[[Fp8Rows, Fp8Blocks, Tensor], Launch]
) -> Callable[[], list[Launch]]:
    return lambda: [bind(*operands) for operands in fp8_operands(tokens, n, k)]


def deepgemm() -> Callable[[Fp8Rows, Fp8Blocks, Tensor], Launch]:
    """As vLLM calls it on sm_90: its own layout of x's scales, made before; float scales as they are."""
    try:
        from vllm.third_party import deep_gemm
    except ImportError:
        import deep_gemm

    def bind(x: Fp8Rows, w: Fp8Blocks, out: Tensor) -> Launch:
        left = x.data, deep_gemm.get_mn_major_tma_aligned_tensor(x.scale)
        right = w.data.T.contiguous(), w.scale.T.contiguous()
        return lambda: deep_gemm.fp8_gemm_nt(left, right, out, disable_ue8m0_cast=True)

    return bind


def cutlass() -> Callable[[Fp8Rows, Fp8Blocks, Tensor], Launch]:
    from vllm import _custom_ops as ops

    def bind(x: Fp8Rows, w: Fp8Blocks, out: Tensor) -> Launch:
        scale = x.scale.T.contiguous().T
        return lambda: ops.cutlass_scaled_mm(x.data, w.data, scale, w.scale, torch.bfloat16)

    return bind


def flashinfer() -> Callable[[Fp8Rows, Fp8Blocks, Tensor], Launch]:
    from flashinfer.gemm import fp8_blockscale_gemm_sm90

    def bind(x: Fp8Rows, w: Fp8Blocks, out: Tensor) -> Launch:
        weights, scale = w.data.T.contiguous(), w.scale.T.contiguous()
        return lambda: fp8_blockscale_gemm_sm90(x.data, weights, x.scale, scale, out=out)

    return bind


def cublas() -> Callable[[Fp8Rows, Fp8Blocks, Tensor], Launch]:
    def bind(x: Fp8Rows, w: Fp8Blocks, out: Tensor) -> Launch:
        scratch = LinearScratch.empty("cuda")
        return lambda: library.scaled_product(x, w, out, scratch)

    return bind


def peer(tokens: int, n: int, k: int, load: Callable[[], Callable[[Fp8Rows, Fp8Blocks, Tensor], Launch]]) -> Callable:
    return lambda: each(tokens, n, k, load())()


def fp8_case(tokens: int, n: int, k: int) -> KernelCase:
    def make(tile: dict | None) -> list[Launch]:
        scratch = LinearScratch.empty("cuda")
        return each(tokens, n, k, lambda x, w, out: lambda: linear(x, w, out, scratch=scratch, tile=tile))()

    def check() -> float:
        x, w, out = fp8_operands(tokens, n, k)[0]
        linear(x, w, out, scratch=LinearScratch.empty("cuda"))
        want = torch.empty(tokens, n, device="cuda")
        naive.linear(dequantise(x), dequantise(w), want)
        return error_ratio(out, want)

    small, large = DEEPGEMM[n, k]
    goal = f"< {small} us" if tokens <= 64 else f"<= {large / 0.9:.0f} us" if tokens == 4096 else ""
    loaders = {"DeepGEMM": deepgemm, "scaled_mm": cublas, "vLLM cutlass": cutlass, "flashinfer": flashinfer}
    return KernelCase(
        "linear", f"fp8 {n}x{k}, {tokens} tokens", make,
        bytes=n * k * (1 + 4 / GROUP**2) + tokens * (k * (1 + 4 / GROUP) + 2 * n),
        flops=2 * tokens * n * k, kind="fp8", tiles=lambda: candidates(tokens, n, k, torch.float8_e4m3fn),
        tuned=("linear", shape_name(n, k, torch.float8_e4m3fn), tokens), check=check,
        peers={name: peer(tokens, n, k, load) for name, load in loaders.items()}, goal=goal,
    )  # fmt: skip


def bf16_operands(tokens: int, n: int, k: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    def one() -> tuple[Tensor, Tensor, Tensor]:
        x, w, out = (torch.randn(shape, device="cuda").bfloat16() for shape in ((tokens, k), (n, k), (tokens, n)))
        return x, w.T, out

    return [one() for _ in range(copies(2 * n * k))]


def bf16_case(tokens: int, n: int, k: int) -> KernelCase:
    def make(tile: dict | None) -> list[Launch]:
        scratch = LinearScratch.empty("cuda")

        def bind(x: Tensor, w: Tensor, out: Tensor) -> Launch:
            return lambda: linear(x, w, out, scratch=scratch, tile=tile)

        return [bind(*operands) for operands in bf16_operands(tokens, n, k)]

    def torch_mm() -> list[Launch]:
        return [lambda x=x, w=w, out=out: torch.mm(x, w, out=out) for x, w, out in bf16_operands(tokens, n, k)]  # type: ignore[misc]

    def check() -> float:
        x, w, out = bf16_operands(tokens, n, k)[0]
        linear(x, w, out, scratch=LinearScratch.empty("cuda"))
        return error_ratio(out, x.float() @ w.float())

    return KernelCase(
        "linear", f"bf16 {n}x{k}, {tokens} tokens", make, bytes=2 * (n * k + tokens * (n + k)),
        flops=2 * tokens * n * k, kind="bf16", tiles=lambda: candidates(tokens, n, k, torch.bfloat16),
        tuned=("linear", shape_name(n, k, torch.bfloat16), tokens), check=check, peers={"torch.mm": torch_mm},
    )  # fmt: skip


def cases() -> list[KernelCase]:
    fp8 = [fp8_case(tokens, n, k) for n, k in R1 for tokens in (1, 16, 64, 128, 1024, 4096)]
    return fp8 + [bf16_case(tokens, n, k) for n, k in V2_LITE for tokens in (1, 16, 64)]

"""vLLM's engine as a peer of benchmarks.engine, in a process of its own: it must be importable there, and is no
dependency.

python -m benchmarks.vllm_peer FOLDER MAX_BATCH MAX_CONTEXT CHUNK MEMORY

Prints `ready SECONDS`; then for each line `inputs streams outputs temperature` on stdin the seconds it took. Weights
are drawn as ours are: with its own dummy ones all tokens choose the same experts.
"""

from __future__ import annotations

import os
import random
import sys
import time


def main(folder: str, max_batch: int, max_context: int, chunk: int, memory: float) -> None:
    os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is for stderr
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    # Those of its own that the points have: kernels of a size compile for 20 s, and of 8,192 prompt tokens none is one.
    sizes = sorted({1 << i for i in range(max_batch.bit_length())} | {max_batch})
    llm = LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, enable_prefix_caching=False, max_num_seqs=max_batch,
        max_model_len=max_context, max_num_batched_tokens=chunk, gpu_memory_utilization=memory, dtype="bfloat16",
        compilation_config={"cudagraph_capture_sizes": sizes},
    )  # fmt: skip
    core = llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.get_model()
    draw(model)
    vocab = llm.model_config.get_vocab_size()
    print(f"ready {time.perf_counter() - started:.1f}", file=answers)
    for line in sys.stdin:
        inputs, streams, outputs, temperature = line.split()
        numbers = random.Random(line)
        prompts = [
            {"prompt_token_ids": [numbers.randrange(vocab) for _ in range(int(inputs))]} for _ in range(int(streams))
        ]
        sampling = SamplingParams(
            max_tokens=int(outputs), temperature=float(temperature), ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        found = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(one.outputs[0].token_ids) == int(outputs) for one in found)
        print(seconds, file=answers)


def draw(model) -> None:  # type: ignore[no-untyped-def]
    """N(0, 0.02), norms 1; in 8 bits with the scales that such blocks have."""
    import torch

    largest = 4.1 * 0.02  # of the 16,384 numbers of a block
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dtype == torch.float8_e4m3fn:
                for part in value if value.dim() == 3 else (value,):
                    part.copy_((torch.randn(part.shape, device=part.device) * (448 / 4.1)).clamp_(-448, 448))
            elif "scale" in name:
                value.fill_(largest / 448)
            elif "norm" in name:
                value.fill_(1)
            elif name.endswith("bias"):
                value.zero_()
            elif value.is_floating_point():
                value.normal_(0, 0.02)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))

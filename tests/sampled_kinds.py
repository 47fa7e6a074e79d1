"""Which kernels sampling launches for all that a request may ask for, on a machine without a GPU: for
tests/test_prefill_sizes.py, which starts it as a process of its own.

python -m tests.sampled_kinds

prints a JSON object: what was asked for -> the names of its kernels that were not rehearsed.
"""

from __future__ import annotations

import json
from typing import Any

from tests.prefill_sizes import OnCpu, watch_launches

ROWS = 1, 2, 3, 16, 33
KINDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "filters": {"top_p": 0.9, "top_k": 5, "min_p": 0.1},
    **{f"logprobs {n}": {"logprobs": n} for n in (0, 1, 2, 5, 20)},
    "presence": {"presence_penalty": 0.5},
    "repetition": {"repetition_penalty": 1.2, "frequency_penalty": -0.5},
    "min_tokens": {"min_tokens": 3, "stop_token_ids": (1, 2)},
    "bias": {"logit_bias": ((3, 1.0), (5, -1.0))},
}


def main() -> None:
    known = watch_launches()
    import torch

    from common.messages import Generate, Sampling
    from common.model_config import ModelConfig
    from services.gpu_worker.planner import Sequence
    from services.gpu_worker.sampler import Sampler

    found = {}
    with OnCpu():
        config = ModelConfig.load("models/tiny")
        sampler = Sampler(config, max_batch=64, threads=1, device="cuda")
        sampler.rehearse(torch.bfloat16)
        for temperature in (0.0, 0.7):
            for kind, asked in KINDS.items():
                for rows in ROWS:
                    before = set(known)
                    sampling = Sampling(max_tokens=9, temperature=temperature, **asked)
                    request = Generate(request_id="r", gateway_id="g", prompt=(7, 8), sampling=sampling)
                    sequences = tuple(Sequence.of(request, i) for i in range(rows))
                    for sequence in sequences:
                        sampler.add(sequence)
                    logits = torch.zeros(64, config.vocab, dtype=torch.bfloat16)
                    sampler.sample(sequences, logits[:rows], torch.zeros(64, dtype=torch.int64)[:rows], None)
                    for sequence in sequences:
                        sampler.forget(sequence)
                    if new := sorted({name for name, _ in known - before}):
                        found[f"{rows} rows, temperature {temperature}, {kind}"] = new
    print(json.dumps(found))


if __name__ == "__main__":
    main()

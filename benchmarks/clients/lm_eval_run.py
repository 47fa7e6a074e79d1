"""lm-eval's local-completions scores ten continuations over the endpoint; transformers scores them from the checkpoint.

python -m benchmarks.clients.lm_eval_run [--url http://127.0.0.1:8000] [--model tiny] [--checkpoint models/tiny]

Exit status 1 if a loglikelihood differs by 1e-3 or more, or one side takes a continuation for the most likely one and
the other does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.clients.environments import command_line, endpoint, interpreter, run

TASKS = Path(__file__).parent / "tasks"
GOAL = 1e-3


class Score(NamedTuple):
    loglikelihood: float
    greedy: bool
    """Whether every token of the continuation is the most likely one."""


def by_lm_eval(url: str, model: str, options: argparse.Namespace) -> list[Score]:
    """Two prompts of token ids a request, two requests at a time. Ends the program if lm-eval does not end well."""
    with tempfile.TemporaryDirectory(prefix="moecule-lm-eval-") as output:
        arguments = [
            f"base_url={url}/v1/completions", f"model={model}", f"tokenizer={options.checkpoint.resolve()}",
            "tokenizer_backend=huggingface", "tokenized_requests=True", "max_length=4096", "num_concurrent=2",
            "max_retries=1",
        ]  # fmt: skip
        status = run(
            interpreter("lm-eval", options.venvs), "-m", "lm_eval", "run", "--model", "local-completions",
            "--model_args", ",".join(arguments), "--include_path", TASKS, "--tasks", "scores", "--batch_size", "2",
            "--log_samples", "--output_path", output, folder=TASKS,
        )  # fmt: skip
        found = list(Path(output).rglob("samples_scores_*.jsonl"))
        if status or len(found) != 1:
            sys.exit(f"FAIL: lm-eval ended with exit code {status} and left {len(found)} files of samples")
        samples = [json.loads(line) for line in found[0].read_text().splitlines()]
    in_order = sorted(samples, key=lambda sample: sample["doc_id"])
    return [Score(float(value), str(greedy) == "True") for sample in in_order for (value, greedy) in sample["resps"][0]]


@torch.inference_mode()
def by_transformers(checkpoint: Path) -> list[Score]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    scores = []
    for item in items():
        whole = tokenizer.encode(item["prompt"] + item["continuation"], add_special_tokens=False)
        start = len(tokenizer.encode(item["prompt"], add_special_tokens=False))
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)  # [tokens, vocabulary]
        told, predicted = torch.tensor(whole[start:]), logprobs[start - 1 : -1]
        value = predicted.gather(1, told[:, None]).sum().item()
        scores.append(Score(value, bool((predicted.argmax(-1) == told).all())))
    return scores


def items() -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASKS / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> int:
    options = command_line(__doc__).parse_args()
    with endpoint(options) as (url, model):
        theirs = by_lm_eval(url, model, options)
    ours = by_transformers(options.checkpoint)
    print("\n| continuation | lm-eval over the endpoint | transformers | difference |\n|---|--:|--:|--:|")
    worst, alike = 0.0, True
    for item, one, other in zip(items(), theirs, ours, strict=True):
        difference = abs(one.loglikelihood - other.loglikelihood)
        worst, alike = max(worst, difference), alike and one.greedy == other.greedy
        name = item["continuation"].strip()[:30]
        print(f"| {name} | {one.loglikelihood:.5f} | {other.loglikelihood:.5f} | {difference:.1e} |")
    passed = worst < GOAL and alike
    print(f"\nlargest difference {worst:.1e} (goal {GOAL:.0e}), most likely ones {'alike' if alike else 'not alike'}: "
          f"{'pass' if passed else 'FAIL'}")  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""A load generator at the endpoint: evalscope perf, or guidellm; prints its own summary.

python -m benchmarks.clients.load [--url http://127.0.0.1:8000] [--model tiny] [--tool guidellm] [--streams 4]

Random prompts, outputs of 64 tokens. Exit status 1 if a request failed. guidellm brings its own PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.clients.environments import command_line, endpoint, interpreter, run

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64


def evalscope(url: str, model: str, options: argparse.Namespace, output: Path) -> int:
    """How many requests succeeded."""
    run(
        interpreter("evalscope", options.venvs).with_name("evalscope"), "perf", "--api", "openai", "--stream",
        "--url", f"{url}/v1/chat/completions", "--model", model, "--tokenizer-path", options.checkpoint.resolve(),
        "--dataset", "random", "--min-prompt-length", str(PROMPT_TOKENS // 2),
        "--max-prompt-length", str(2 * PROMPT_TOKENS), "--max-tokens", str(OUTPUT_TOKENS),
        "--min-tokens", str(OUTPUT_TOKENS), "--extra-args", json.dumps({"ignore_eos": True}),
        "--parallel", str(options.streams), "--number", str(options.requests),
        "--warmup-num", str(options.streams), "--outputs-dir", output, "--no-timestamp",
    )  # fmt: skip
    return sum(json.loads(path.read_text())["Success Requests"] for path in output.rglob("benchmark_summary.json"))


def guidellm(url: str, model: str, options: argparse.Namespace, output: Path) -> int:
    report = output / "report.json"
    run(
        interpreter("guidellm", options.venvs).with_name("guidellm"), "run", "--disable-progress",
        "--backend", f"kind=openai_http,target={url},model={model}",
        "--profile", f"kind=concurrent,streams={options.streams}",
        "--constraint", f"kind=max_requests,count={options.requests}",
        "--tokenizer", f"kind=hf_auto,model={options.checkpoint.resolve()}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "--output", "kind=console", "--output", f"kind=json,path={report}",
    )  # fmt: skip
    if not report.exists():
        return 0
    return sum(one["metrics"]["request_totals"]["successful"] for one in json.loads(report.read_text())["benchmarks"])


def main() -> int:
    parser = command_line(__doc__)
    tools = {"evalscope": evalscope, "guidellm": guidellm}
    parser.add_argument("--tool", choices=tools, default="evalscope", help="(default %(default)s)")
    parser.add_argument("--streams", type=int, default=4, help="requests at a time (default %(default)s)")
    parser.add_argument("--requests", type=int, default=40, help="requests in all (default %(default)s)")
    options = parser.parse_args()
    with endpoint(options) as (url, model), tempfile.TemporaryDirectory(prefix="moecule-load-") as output:
        succeeded = tools[options.tool](url, model, options, Path(output))
    print(f"{options.tool}: {succeeded} of {options.requests} requests succeeded")
    return 0 if succeeded == options.requests else 1


if __name__ == "__main__":
    sys.exit(main())

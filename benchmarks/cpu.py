"""Tokens/s of 8 concurrent REST streams against transformers' generate with a batch of 8, same checkpoint, same run.

python -m benchmarks.cpu [--streams 8] [--tokens 256] [--rounds 5]

Both sides do the same work: the same prompts, greedy, a fixed number of output tokens (end of sequence ignored),
float32. The sides alternate, round by round, since machines are noisy; transformers may use all cores, and the cluster
(with MOECULE_PIN=1) is idle while it runs. Then a step is split: what a token costs in the model, and outside of it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
import urllib.request

from benchmarks.cluster import cluster

MODEL = "models/tiny"
SETTLE_SECONDS = 3.0
WARM_TOKENS = 32


def peer(prompts: list[list[int]]):
    """A function that runs transformers' generate for so many tokens and returns its seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)

    def run(tokens: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + tokens
        return time.perf_counter() - started

    return run


async def stream_all(url: str, prompts: list[list[int]], tokens: int) -> float:
    """Seconds from the first request to the last token of all streams. The client reads bytes and nothing more: it
    shares the machine's cores with the cluster, and is not what is measured."""
    host, port = url.removeprefix("http://").split(":")

    async def one(prompt: list[int]) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}\r\n"
        writer.write(f"{head}connection: close\r\n\r\n".encode() + data)
        answer = await reader.read()
        writer.close()
        assert f'"completion_tokens":{tokens}'.encode() in answer and b"[DONE]" in answer, answer[-500:]

    started = time.perf_counter()
    await asyncio.gather(*(one(prompt) for prompt in prompts))
    return time.perf_counter() - started


def settle() -> None:
    """A virtual machine that was busy is given less for a while: neither side shall start on the other's debt."""
    gc.collect()
    time.sleep(SETTLE_SECONDS)


def step_seconds(url: str) -> tuple[float, float]:
    """(sum, count) of the workers' step times so far."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    total = {"sum": 0.0, "count": 0.0}
    for line in text.splitlines():
        for part in total:
            if line.startswith(f"moecule_step_seconds_{part}"):
                total[part] += float(line.rpartition(" ")[2])
    return total["sum"], total["count"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tokens, total = arguments.tokens, arguments.streams * arguments.tokens
    # Different first tokens, so that no two streams share a page.
    prompts = [[100 + row] + [300 + (7 * row + 13 * i) % 700 for i in range(31)] for row in range(arguments.streams)]
    generate = peer(prompts)
    with cluster(log_level="warning", pin=1, device="cpu") as running:
        ours, theirs = [], []
        for number in range(arguments.rounds):
            settle()
            generate(WARM_TOKENS)
            theirs.append(total / generate(tokens))
            settle()
            asyncio.run(stream_all(running.url, prompts, WARM_TOKENS))
            ours.append(total / asyncio.run(stream_all(running.url, prompts, tokens)))
            print(f"round {number + 1}: {ours[-1]:.0f} against {theirs[-1]:.0f} tokens/s", file=sys.stderr, flush=True)
        before = step_seconds(running.url)
        wall = asyncio.run(stream_all(running.url, prompts, tokens))
        after = step_seconds(running.url)
    steps, in_model = after[1] - before[1], after[0] - before[0]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"\n{arguments.streams} streams of {tokens} tokens, float32, {arguments.rounds} alternated rounds, medians\n")
    print("| | tokens/s |\n|---|--:|")
    print(f"| Moecule, REST, one worker, two shards | {statistics.median(ours):.0f} |")
    print(f"| transformers generate, batch of {arguments.streams} | {statistics.median(theirs):.0f} |")
    print(f"| ratio (goal: at least 2) | {statistics.median(ratios):.2f} |")
    whole, outside = 1e6 * wall / total, 1e6 * (wall - in_model) / total
    print(f"\n{steps:.0f} steps of {1e3 * in_model / steps:.2f} ms; a token {whole:.0f} us, of which {outside:.0f} us")
    print("are outside the model: bus, gateway, SSE and this client, as far as the next step does not hide them.")
    sys.exit(0 if statistics.median(ratios) >= 2 else 1)


if __name__ == "__main__":
    main()

"""What grammars cost a step, and whether what follows them is right, on models/tiny in this process (no HTTP).

python -m benchmarks.grammar [--streams 16] [--tokens 192] [--rounds 9] [--schemas 1000] [--seed 1]

First so many constrained streams against as many free ones of the same length, round by round in turn: the median step
of each, and their ratio (goal: at most 1.15). Then random JSON schemas at temperature 1: every answer that ended by
itself must parse and validate. Exit status 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from random import Random

import jsonschema
from tokenizers import Tokenizer

from common.messages import Grammar, Sampling
from tests.compose import TINY, Composed, compose
from tests.schemas import random_schema

GOAL = 1.15
AT_ONCE = 32
ANSWER_TOKENS = 512
# Endless records, of which each has all that makes masks expensive: free text, numbers, a choice.
ENDLESS = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "size": {"type": "number"},
            "colour": {"enum": ["red", "green", "blue", None]},
        },
        "required": ["name", "age", "size", "colour"],
        "additionalProperties": False,
    },
}


@dataclass
class StepTimes:
    """Seconds of the worker's steps in which all `streams` decoded, and nothing else was done."""

    streams: int
    seconds: list[float] = field(default_factory=list)

    def watch(self, cluster: Composed) -> None:
        metered = cluster.workers[0].metered
        before = metered.step

        def step(output) -> None:
            before(output)
            tokens = sum(len(chunk.tokens) for chunks in output.chunks.values() for chunk in chunks)
            if tokens == self.streams and not output.stats.prefill_tokens:
                self.seconds.append(output.stats.seconds)

        metered.step = step

    def take(self) -> float:
        taken, self.seconds = self.seconds, []
        return statistics.median(taken)


async def compare(cluster: Composed, streams: int, tokens: int, rounds: int) -> float:
    times = StepTimes(streams)
    times.watch(cluster)
    grammar = Grammar("json_schema", json.dumps(ENDLESS))
    seen: dict[str, list[float]] = {"free": [], "constrained": []}

    async def run(kind: str, seed: int) -> None:
        asked = []
        for row in range(streams):
            sampling = Sampling(
                max_tokens=tokens, seed=seed + row, ignore_eos=True, grammar=grammar if kind == "constrained" else None
            )
            asked.append(await cluster.client.send([100 + row, 300, 301], sampling))
        for request in asked:
            assert len((await cluster.client.wait(request, 600)).tokens) == tokens

    for kind in seen:
        await run(kind, 0)
        times.take()
    for number in range(rounds):
        for kind, medians in seen.items():
            await run(kind, 1000 * number)
            medians.append(1e3 * times.take())
        print(f"round {number + 1}: {seen['constrained'][-1]:.2f} against {seen['free'][-1]:.2f} ms", file=sys.stderr)
    free, constrained = map(statistics.median, (seen["free"], seen["constrained"]))
    print(f"{streams} streams of {tokens} tokens, {rounds} rounds in turn, medians\n")
    print(f"| | ms a step |\n|---|--:|\n| free | {free:.2f} |\n| constrained | {constrained:.2f} |")
    print(f"| ratio (goal: at most {GOAL}) | {constrained / free:.2f} |\n", flush=True)
    return constrained / free


async def validate(cluster: Composed, schemas: int, seed: int) -> bool:
    tokenizer, gate = Tokenizer.from_file(f"{TINY}/tokenizer.json"), asyncio.Semaphore(AT_ONCE)
    prompt = tokenizer.encode("<｜User｜>Give me a record as JSON.<｜Assistant｜>", add_special_tokens=False).ids
    counts = {"stop": 0, "length": 0, "wrong": 0}

    async def one(number: int) -> None:
        schema = random_schema(Random(f"{seed}/{number}"))
        grammar = Grammar("json_schema", json.dumps(schema))
        async with gate:
            sampling = Sampling(max_tokens=ANSWER_TOKENS, seed=number, grammar=grammar)
            result = await cluster.client.ask([0, *prompt], sampling)
        counts[result.last.finish] += 1
        if result.last.finish == "stop":
            tokens = result.tokens[:-1] if result.last.stop_token is not None else result.tokens
            text = tokenizer.decode(tokens, skip_special_tokens=False)
            try:
                jsonschema.validate(json.loads(text), schema)
            except (ValueError, jsonschema.ValidationError) as error:
                counts["wrong"] += 1
                print(f"\nschema {number}: {json.dumps(schema)}\n{text!r}\n{error}", file=sys.stderr)
        print(f"\r{counts}", end="", file=sys.stderr, flush=True)

    started = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(schemas)))
    print(file=sys.stderr)
    print(f"{schemas} random schemas, temperature 1, {ANSWER_TOKENS} tokens at most: {counts['stop']} ended by")
    print(f"themselves, of which {counts['wrong']} do not validate; {time.perf_counter() - started:.0f} s")
    return counts["stop"] > 0 and not counts["wrong"]


async def run(arguments: argparse.Namespace) -> bool:
    async with compose(log_level="error", max_batch=max(AT_ONCE, arguments.streams)) as cluster:
        ratio = await compare(cluster, arguments.streams, arguments.tokens, arguments.rounds)
        return await validate(cluster, arguments.schemas, arguments.seed) and ratio <= GOAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    sys.exit(0 if asyncio.run(run(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()

"""How often models/tiny is right, through the REST endpoint, on held-out prompts drawn with a seed of their own.

python -m benchmarks.accuracy [--url http://127.0.0.1:8000] [--cases 300] [--seed 1]
python -m benchmarks.accuracy kv_cache=fp8 experts_fp8=1
python -m benchmarks.accuracy --fp8

Without --url it starts a cluster on free ports, on the GPU where there is one, with the settings that are named. --fp8:
of a copy of the model in fp8, as DeepSeek publishes it: all matrices but the embedding, the head and the router in
blocks of 128x128. Exit status 1 if a figure is under its goal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random

import openai
from safetensors.torch import load_file, save_file

from benchmarks.cluster import ROOT, cluster
from benchmarks.shapes import R1, in_blocks
from common.settings import FIELDS
from training import data

# task -> (how an example is made, the least share that must be right; None: only printed)
SUITE = {
    "add": (None, 0.97),
    "retrieve at 1,000 tokens": (functools.partial(data.retrieval, tokens=1000), 0.95),
    "retrieve at 2,000 tokens": (functools.partial(data.retrieval, tokens=2000), 0.95),
    "subtract": (None, None),
    "reverse": (None, None),
    "sort": (None, None),
    "count": (None, None),
}
STREAMS = 16
TINY = ROOT / "models" / "tiny"


def examples(name: str, count: int, seed: int) -> list[data.Example]:
    make, _ = SUITE[name]
    rng = Random(f"{seed}/{name}")
    found: dict[str, data.Example] = {}
    while len(found) < count:
        example = data.draw(name.split()[0], rng, held_out=True, make=make)
        found.setdefault(example.key, example)
    return list(found.values())


async def score(client: openai.AsyncOpenAI, model: str, cases: list[data.Example], name: str) -> float:
    gate, done, right = asyncio.Semaphore(STREAMS), 0, 0

    async def one(example: data.Example) -> None:
        nonlocal done, right
        async with gate:
            answer = await client.chat.completions.create(
                model=model, messages=list(example.messages), temperature=0, max_tokens=512
            )
        message = answer.choices[0].message
        text = f"{getattr(message, 'reasoning_content', '') or ''}{data.END_THINK}{message.content or ''}"
        right += data.is_right(example, text)
        done += 1
        print(f"\r{name}: {done}/{len(cases)}, {right} right", end="", file=sys.stderr, flush=True)

    await asyncio.gather(*(one(example) for example in cases))
    print(file=sys.stderr)
    return right / len(cases)


async def run(url: str, cases: int, seed: int) -> bool:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    model = (await client.models.list()).data[0].id
    print(f"model {model}, {cases} held-out prompts a task, seed {seed}, greedy\n")
    print("| task | right | goal |\n|---|--:|--:|")
    passed = True
    for name, (_, goal) in SUITE.items():
        share = await score(client, model, examples(name, cases, seed), name)
        passed &= goal is None or share >= goal
        print(f"| {name} | {share:.1%} | {'' if goal is None else f'{goal:.0%}'} |", flush=True)
    return passed


def write_fp8(folder: Path) -> Path:
    """models/tiny as a checkpoint in fp8. Its widths are multiples of 128."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": R1["quantization_config"]}))
    file = "model.safetensors"
    save_file(dict(in_blocks(load_file(TINY / file).items())), folder / file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running endpoint; default: start a cluster")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="of that cluster")
    parser.add_argument("--fp8", action="store_true", help="start it with a copy of the model in fp8")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    settings = {name: value for name, _, value in (setting.partition("=") for setting in arguments.settings)}
    if unknown := settings.keys() - FIELDS.keys():
        parser.error(f"no setting is called {', '.join(sorted(unknown))}")
    if arguments.url and (settings or arguments.fp8):
        parser.error("settings and --fp8 are of a cluster that is started here, not of --url")
    if arguments.fp8 and "model" in settings:
        parser.error("--fp8 is of models/tiny")
    if said := [*arguments.settings, *["an fp8 checkpoint"] * arguments.fp8]:
        print(f"with {', '.join(said)}:", end=" ")
    with contextlib.ExitStack() as stack:
        if arguments.fp8:
            settings["model"] = str(write_fp8(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tiny"))
        url = arguments.url or stack.enter_context(cluster(**{"log_level": "warning", **settings})).url
        passed = asyncio.run(run(url, arguments.cases, arguments.seed))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()

"""Whether clients that disconnect at random leave anything behind. Needs locust: pip install -e ".[locust]".

python -m benchmarks.abandon [--seconds 300] [--users 32] [--seed 1]

It starts a cluster of its own; locust's users ask it for streams and whole answers, and read all, leave after some
events or at once, stall and then leave, or leave in the middle of their body. What the actors hold is counted before
(after some of the same traffic, which fills thread pools) and once it is quiet again: requests, KV pages that requests
own, asyncio tasks, threads, file descriptors and sockets. Exit status 1 where there is more of one than before, an
actor restarted, the cluster answers otherwise than before, or a user got something else than what it asked for.

Memory is printed and not judged: the worker's grows with every page of its KV pool that is written for the first time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.cluster import ROOT, Cluster, cluster, memory_kb
from benchmarks.hostile import answer

WARM_SECONDS = 15
QUIET_SECONDS = 10.0
LOOKS = 8  # at an idle cluster: a heartbeat or a scrape has a task or a socket more, or less, for a moment
METRICS = {
    "moecule_gateway_requests_running": "requests",
    "moecule_num_requests_running": "requests in the batch",
    "moecule_num_requests_waiting": "requests in the queue",
    "moecule_kv_pages_used": "KV pages in use",
    "moecule_asyncio_tasks": "asyncio tasks",
}


class Of(NamedTuple):
    actor: str
    what: str


Held = dict[Of, int]


def held(running: Cluster) -> Held:
    with urllib.request.urlopen(f"{running.url}/metrics", timeout=10) as got:
        text = got.read().decode()
    found: Held = {}
    for name, actor, value in re.findall(r'^(\w+)\{actor="([^"]+)"\} (\S+)$', text, re.MULTILINE):
        if name in METRICS:
            found[Of(actor, METRICS[name])] = int(float(value))
    for service, pids in running.all_actor_pids().items():
        for number, pid in enumerate(pids):
            found |= {Of(f"{service}, process {number}", what): count for what, count in of_process(pid).items()}
    return found


def of_process(pid: int) -> dict[str, int]:
    files = []
    for one in Path(f"/proc/{pid}/fd").iterdir():
        try:
            files.append(os.readlink(one))
        except FileNotFoundError:  # closed meanwhile
            continue
    return {
        "threads": len(list(Path(f"/proc/{pid}/task").iterdir())),
        "descriptors": len(files),
        "sockets": sum(one.startswith("socket:") for one in files),
    }


def least(first: Held, second: Held) -> Held:
    return {of: min(first.get(of, count), count) for of, count in second.items()}


def held_when_idle(running: Cluster) -> Held:
    """What there mostly is: the least would be of a moment that need not come again."""
    looks: dict[Of, list[int]] = {}
    for _ in range(LOOKS):
        time.sleep(0.25)
        for of, count in held(running).items():
            looks.setdefault(of, []).append(count)
    return {of: statistics.median_low(counts) for of, counts in looks.items()}


def more_than(before: Held, running: Cluster) -> tuple[Held, Held]:
    """The least there is until it is quiet, and what of it is more than before."""
    deadline, found = time.monotonic() + QUIET_SECONDS, held(running)
    while True:
        more = {of: count for of, count in found.items() if count > before.get(of, 0)}
        if not more or time.monotonic() > deadline:
            return found, more
        time.sleep(0.25)
        found = least(found, held(running))


def locust(running: Cluster, seconds: int, users: int, seed: int, *, quiet: bool = False) -> bool:
    """Whether each user got what it asked for."""
    file = Path(__file__).with_name("abandon_locust.py")
    command = [
        sys.executable, "-m", "locust", "-f", str(file), "--headless", "-u", str(users), "-r", str(users),
        "-t", f"{seconds}s", "--only-summary", "--host", running.url, "--loglevel", "ERROR",
    ]  # fmt: skip
    out = subprocess.DEVNULL if quiet else None
    environment = os.environ | {"ABANDON_SEED": str(seed)}
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out).returncode == 0


def leaves_nothing(running: Cluster, warm: Callable[[], object], traffic: Callable[[], bool]) -> bool:
    """Prints what there was before the traffic, and after."""
    warm()
    pids, said = running.all_actor_pids(), answer(running.url)
    before = held_when_idle(running)
    memory = {pid: memory_kb(pid) for some in pids.values() for pid in some}
    served = traffic()
    after, more = more_than(before, running)
    same = running.all_actor_pids() == pids
    print("\n| actor | what | before | after |\n|---|---|--:|--:|")
    for of in sorted(before.keys() | after.keys()):
        print(f"| {of.actor} | {of.what} | {before.get(of, '-')} | {after.get(of, '-')} |")
    for service, ours in pids.items() if same else ():
        for number, pid in enumerate(ours):
            print(f"| {service}, process {number} | KB | {memory[pid]} | {memory_kb(pid)} |")
    gone, as_before = before.keys() - after.keys(), answer(running.url) == said
    print(f"\nleft behind: {', '.join(map(': '.join, more)) or 'nothing'}; "
          f"actors {'the same' if same else 'RESTARTED'}; answers {'as before' if as_before else 'OTHERWISE'}; "
          f"users {'served' if served else 'NOT SERVED'}")  # fmt: skip
    return not more and not gone and same and as_before and served


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if importlib.util.find_spec("locust") is None:
        parser.error('locust is not installed: pip install -e ".[locust]"')
    with cluster(device="cpu", log_level="error") as running:
        good = leaves_nothing(
            running,
            lambda: locust(running, WARM_SECONDS, options.users, options.seed + 1, quiet=True),
            lambda: locust(running, options.seconds, options.users, options.seed),
        )
        if not good:
            print(running.output()[-3000:], file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

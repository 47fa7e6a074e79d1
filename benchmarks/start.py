"""Seconds from a command to a server that is ready, by phase; medians of several starts.

python -m benchmarks.start [--runs 3] [--cold] [-- COMMAND ...]

Without a command it starts what `make serve` starts here, with free ports, and settings as the environment has them. A
command of its own gets the port in place of {port}, and in MOECULE_PORT: `-- vllm serve MODEL --port {port}`.

/health and /ready are polled (a server without /ready is ready when /health answers), then one token is asked for.
The other phases are what the actors log: each line that honcho passes on is stamped when it arrives, and an event that
comes several times before the cluster is ready counts where it came last. --cold gives each start an empty folder for
compiled kernels; the files of the model stay in the page cache. Exit status 1 if a start failed or left a process
behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.cluster import ROOT, die_with_parent, free_ports

POLL_SECONDS = 0.02
LIMIT_SECONDS = 600.0
STOP_SECONDS = 20.0
LAST_SECONDS = 3.0  # for what the command started, after it ended
MARK = "BENCH_START"  # in the environment of every process of a start, by which they are found
HONCHO_LINE = re.compile(r"\d\d:\d\d:\d\d (?P<process>\S+) +\| (?P<text>.*)")


class Log:
    """The output of a start, each line with the second it came at."""

    def __init__(self, output: IO[str], began: float) -> None:
        self.lines: list[tuple[float, str]] = []
        self._began = began
        self._thread = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._thread.start()

    def _read(self, output: IO[str]) -> None:
        with output:
            for line in output:
                self.lines.append((time.monotonic() - self._began, line.rstrip("\n")))

    def text(self, lines: int = 40) -> str:
        return "\n".join(line for _, line in self.lines[-lines:])

    def reason(self) -> str:
        """The last sentence of a line that could not start. That a supervisor restarts its child tells no cause."""
        texts = (found["text"] if (found := HONCHO_LINE.match(line)) else line for _, line in reversed(self.lines))
        return next((text for text in texts if text.startswith("moecule: ") and ": restart in " not in text), "")

    def close(self, seconds: float = STOP_SECONDS) -> None:
        """Once every process that holds the pipe is gone."""
        self._thread.join(seconds)


def phase_of(line: str) -> str:
    """What a line of honcho's tells, as 'gpu_worker: ready'; empty if it is no phase."""
    if not (found := HONCHO_LINE.match(line)):
        return ""
    service, text = found["process"].rpartition(".")[0] or found["process"], found["text"]
    if service == "system":
        return "processes started" if " started " in text else ""
    if text.endswith("Server is ready"):
        return f"{service}: ready"
    try:
        return f"{service}: {json.loads(text)['event']}"
    except (ValueError, KeyError, TypeError):
        return ""


def phases(lines: Sequence[tuple[float, str]], until: float) -> dict[str, float]:
    """The last second up to `until` at which each phase was told."""
    told = ((phase_of(line), at) for at, line in lines if at <= until)
    return {phase: at for phase, at in told if phase}


class Server:
    """One start of the command. Leaves no process when it is closed: `left` counts those that had to be killed."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.port, nats = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self.left = 0
        self._told = 0
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        own = {
            "MOECULE_PORT": str(self.port), "MOECULE_NATS_URL": f"nats://127.0.0.1:{nats}", "MOECULE_LOG_JSON": "1",
            "PYTHONUNBUFFERED": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", name: value,
        }  # fmt: skip
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            [part.replace("{port}", str(self.port)) for part in command], cwd=ROOT, env={**env, **own}, text=True,
            errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.log = Log(self._process.stdout, self.began)

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def wait_ready(self, limit: float) -> tuple[float, float]:
        """The seconds at which /health and /ready answered."""
        health = self.wait_for("/health", limit)
        return health, self.wait_for("/ready", limit, or_missing=True)

    def wait_for(self, path: str, limit: float, *, or_missing: bool = False) -> float:
        """The second at which `path` answered 200, or with `or_missing` 404."""
        while (status := self._status(path)) != 200:
            if or_missing and status == 404:
                break
            if self._process.poll() is not None:
                self.log.close(LAST_SECONDS)  # what it said last may still be on its way
                why = self.log.reason()
                raise RuntimeError(f"the command ended with exit code {self._process.returncode}{why and f', {why}'}")
            if self.seconds() > limit:
                raise RuntimeError(f"{path} did not answer within {limit:.0f} s")
            self._tell()
            time.sleep(POLL_SECONDS)
        return self.seconds()

    def ask(self, limit: float) -> float:
        """The second at which the first token was there."""
        model = self._call("/v1/models", None, limit)["data"][0]["id"]
        self._call("/v1/completions", {"model": model, "prompt": "Once", "max_tokens": 1}, limit)
        return self.seconds()

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        deadline = time.monotonic() + LAST_SECONDS
        while (found := self.pids()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self.left = len(found)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self.log.close()

    def pids(self) -> list[int]:
        """Every process of this start that runs."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def _tell(self) -> None:
        """Once a second: how long it has taken, and what was heard last."""
        if (seconds := int(self.seconds())) > self._told:
            self._told = seconds
            heard = next(filter(None, (phase_of(line) for _, line in reversed(self.log.lines))), "")
            print(f"\r{seconds} s  {heard:<60}", end="", file=sys.stderr, flush=True)

    def _status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=2) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return 0

    def _call(self, path: str, body: dict[str, Any] | None, limit: float) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.url}{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=limit) as answer:
            return json.load(answer)


@contextlib.contextmanager
def environment(cold: bool) -> Iterator[dict[str, str]]:
    """That of a start."""
    with tempfile.TemporaryDirectory(prefix="moecule-kernels-") as folder:
        cache = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        yield {**os.environ, **(cache if cold else {})}


def make_serve(workers: int = 1, shards: int = 2) -> list[str]:
    """The command, without the installation that `make serve` begins with."""
    return [sys.executable, "-m", "common.serve", f"expert_shard={shards},gpu_worker={workers}"]


@contextlib.contextmanager
def running(command: Sequence[str], env: Mapping[str, str]) -> Iterator[Server]:
    """A start, ended with the block. Raises RuntimeError, with the end of the log, where one of them fails."""
    server = Server(command, env)
    try:
        yield server
    except (RuntimeError, OSError) as error:
        raise RuntimeError(f"{error}\n{server.log.text()}") from None
    finally:
        server.close()
    if server.left:
        raise RuntimeError(f"{server.left} processes had to be killed\n{server.log.text()}")


def start_once(command: Sequence[str], cold: bool, limit: float) -> dict[str, float]:
    """The second of each phase. Raises RuntimeError as `running` does."""
    with environment(cold) as env, running(command, env) as server:
        health, ready = server.wait_ready(limit)
        first = server.ask(limit)
    told = phases(server.log.lines, until=ready)
    return told | {"/health answers": health, "/ready answers": ready, "a token is answered": first}


def table(runs: Sequence[Mapping[str, float]]) -> str:
    """Phases in the order of their medians; a dash where a start did not tell of one."""
    names = {name for run in runs for name in run}
    medians = {name: statistics.median(run[name] for run in runs if name in run) for name in names}
    heads = "".join(f" start {i + 1} |" for i in range(len(runs)))
    rows = [f"| seconds after the command |{heads} median |", f"|---|{'--:|' * (len(runs) + 1)}"]
    for name in sorted(names, key=lambda name: (medians[name], name)):
        cells = "".join(f" {run[name]:.2f} |" if name in run else " - |" for run in runs)
        rows.append(f"| {name} |{cells} {medians[name]:.2f} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="starts (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="of what make serve starts (default %(default)s)")
    parser.add_argument("--shards", type=int, default=2, help="the same, where there is no GPU (default %(default)s)")
    parser.add_argument("--cold", action="store_true", help="compile every kernel anew")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, help="seconds to fail after (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write every start's phases to this file")
    parser.add_argument("command", nargs="*", help="what to start; default: what make serve starts")
    options = parser.parse_args()
    command = options.command or make_serve(options.workers, options.shards)
    runs: list[dict[str, float]] = []
    for number in range(options.runs):
        try:
            runs.append(start_once(command, options.cold, options.limit))
        except RuntimeError as error:
            print(f"FAILED, start {number + 1}: {error}", file=sys.stderr)
            return 1
        ready = runs[-1]["/ready answers"]
        print(f"\nstart {number + 1} of {options.runs}: ready after {ready:.2f} s, all processes gone", file=sys.stderr)
    print(table(runs))
    if options.json:
        options.json.write_text(json.dumps(runs, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

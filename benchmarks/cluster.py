"""A local cluster of real processes on free ports, for benchmarks and cluster tests: what `make serve` starts here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from common.serve import procfile_here

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("gateway", "scheduler", "gpu_worker", "expert_shard", "colocated")
START_SECONDS = 300.0  # a GPU's kernels may have to be compiled


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    def __init__(self, workers: int = 1, shards: int = 2, procfile: str = "", **settings: object) -> None:
        """`settings` are MOECULE_ settings by their lower-case names; of those in the environment the device alone
        counts. On a GPU there are no `shards`, the worker's process holds all experts: `procfile` names another."""
        self.port, self.nats_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        device = {"device": os.environ.get("MOECULE_DEVICE", "auto")}
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("MOECULE_")}
        self.env |= {f"MOECULE_{key.upper()}": str(value) for key, value in (device | settings).items()}
        self.env |= {
            "MOECULE_PORT": str(self.port),
            "MOECULE_NATS_URL": f"nats://127.0.0.1:{self.nats_port}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
        }
        self.log = tempfile.NamedTemporaryFile(prefix="moecule-cluster-", suffix=".log", delete=False)  # noqa: SIM115
        formation = f"all=1,gpu_worker={workers},expert_shard={shards}"
        procfile = procfile or procfile_here(self.env, ROOT)
        command = [sys.executable, "-m", "honcho", "-f", procfile, "start", "-c", formation]
        self.honcho = subprocess.Popen(
            command, cwd=ROOT, env=self.env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip

    def output(self) -> str:
        return Path(self.log.name).read_text(errors="replace")

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            if self.honcho.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the cluster is not ready:\n{self.output()[-4000:]}")
            time.sleep(0.05)

    def pids(self, what: str = "") -> list[int]:
        """Processes of this cluster whose command line contains `what`, honcho itself left out."""
        mark = f"MOECULE_NATS_URL={self.env['MOECULE_NATS_URL']}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) not in (self.honcho.pid, os.getpid()):
                with contextlib.suppress(OSError):
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if what in line and mark in (folder / "environ").read_bytes().split(b"\0") and line:
                        found.append(int(folder.name))
        return sorted(found)

    def actor_pids(self, service: str) -> list[int]:
        """The actors themselves, without their supervising parents."""
        pattern = re.compile(rf"-m services\.{service}\b")
        return [p for p in self.pids(f"services.{service}") if pattern.search(_command_line(p))]

    def all_actor_pids(self) -> dict[str, list[int]]:
        return {service: self.actor_pids(service) for service in SERVICES}

    def stop(self, number: int = signal.SIGINT, seconds: float = 15.0) -> int:
        """What Ctrl-C in a terminal does: signal the whole foreground process group. The exit code of honcho."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.honcho.pid, number)
        try:
            return self.honcho.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"the cluster did not stop:\n{self.output()[-4000:]}") from None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.honcho.pid, signal.SIGKILL)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.honcho.wait()

    def remove_log(self) -> None:
        self.log.close()
        Path(self.log.name).unlink(missing_ok=True)


def memory_kb(pid: int) -> int:
    """What it holds in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def die_with_parent() -> None:
    """A benchmark or test that is itself killed must not leave a cluster running; one that a shell runs in the
    background ignores SIGINT, by which the cluster is ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@contextlib.contextmanager
def cluster(workers: int = 1, shards: int = 2, procfile: str = "", **settings: object) -> Iterator[Cluster]:
    """A ready cluster; stopped at the end as Ctrl-C would."""
    running = Cluster(workers, shards, procfile, **settings)
    try:
        running.wait_ready()
        yield running
    finally:
        if running.honcho.poll() is None:
            running.stop()
        running.kill()
        running.remove_log()

"""What several tests need: a NATS server of their own, and buses over it or inside the process."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

# Before anything imports Triton: without a GPU its kernels are interpreted. (tests/test_compile.py compiles them all
# the same, in processes of its own.)
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from common.bus import Bus
from common.lines import NATS_CONF, nats_binary
from common.memory_bus import MemoryBroker, MemoryBus
from common.nats_bus import NatsBus

# hypothesis looks at every garbage collection, and one of those while CPython 3.11 makes the syntax tree of a test file
# ends in "AST constructor recursion depth mismatch". None while they are read, then.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()


WITH_GPU = re.compile(r"mark\.gpu|either_device")  # says a file that has tests for one


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` no other file is imported: a GPU's machine may lack what it needs."""
    if config.option.markexpr != "gpu" or not collection_path.match("test_*.py"):
        return None
    return None if WITH_GPU.search(collection_path.read_text()) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for path in {item.path for item in items if item.get_closest_marker("gpu")}:
        if not WITH_GPU.search(path.read_text()):
            raise pytest.UsageError(f"{path}: `pytest -m gpu` takes the files that say mark.gpu or either_device")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and PyTorch finds none")


REPO = Path(__file__).parent.parent
BusMaker = Callable[[], Awaitable[Bus]]


class NatsServer:
    """A nats-server with the repository's nats.conf, or another, on a free port, which it keeps over restarts."""

    def __init__(self, conf: Path = NATS_CONF) -> None:
        self.port = -1
        self._conf = conf
        self._process: subprocess.Popen[str] | None = None
        self._store = ""
        self.start()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._store = tempfile.mkdtemp(prefix="moecule-nats-")
        command = [nats_binary(), "-c", str(self._conf), "-p", str(self.port), "-sd", self._store]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.port = self._wait_ready()

    def _wait_ready(self) -> int:
        assert self._process is not None and self._process.stderr is not None
        port, said = 0, []
        for line in self._process.stderr:
            said.append(line)
            if found := re.search(r"Listening for client connections on .*:(\d+)", line):
                port = int(found.group(1))
            if "Server is ready" in line:
                return port
        raise RuntimeError("nats-server did not start:\n" + "".join(said))

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def reload(self) -> None:
        """Its configuration, which is in force on return."""
        self.signal(signal.SIGHUP)
        assert self._process is not None and self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if "Reloaded server configuration" in line:
                return
            if "Failed to reload" in line:
                break
        raise RuntimeError("nats-server did not reload:\n" + "".join(said))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self._store, ignore_errors=True)
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    server = NatsServer()
    yield server
    server.kill()


@pytest.fixture
def nats_url(nats_server: NatsServer) -> str:
    return nats_server.url


class Outage:
    """What takes the server away and brings it back, empty, for both kinds of bus."""

    def __init__(self, down: Callable[[], None], up: Callable[[], None]) -> None:
        self.down, self.up = down, up


@pytest.fixture(params=["memory", "nats"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[tuple[BusMaker, Outage]]:
    """(a maker of connected buses that reach each other, the outage of what they run on)"""
    made: list[Bus] = []
    if request.param == "memory":
        broker = MemoryBroker()
        outage = Outage(broker.disconnect, broker.reconnect)
        new: Callable[[], Bus] = lambda: MemoryBus(broker)  # noqa: E731
    else:
        server = request.getfixturevalue("nats_server")
        outage = Outage(server.kill, server.start)
        new = lambda: NatsBus(server.url, "test")  # noqa: E731

    async def make() -> Bus:
        bus = new()
        await bus.connect()
        made.append(bus)
        return bus

    yield make, outage
    for bus in made:
        await bus.close()


@pytest.fixture
def make_bus(cluster: tuple[BusMaker, Outage]) -> BusMaker:
    return cluster[0]

"""The supervising parents, with real processes: what they restart, what ends them, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import common.lines
from common.errors import ConfigError
from common.lines import ActorLine, ready_line
from common.nats_bus import NatsBus
from common.nats_login import Login
from common.serve import lines_of, procfile_here
from common.settings import Settings
from common.supervisor import restart_delay
from common.weight_files import INDEX
from tests.conftest import REPO
from tests.test_nats_users import CONF, write_passwords, write_secrets

TOY = """
import os, signal, sys, time

def leave(*_):
    print("told to leave", flush=True)
    time.sleep(float(os.environ.get("TOY_DRAIN", "0")))
    print("left", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, leave)
print("child", os.getpid(), flush=True)
if code := os.environ.get("TOY_EXIT"):
    time.sleep(float(os.environ.get("TOY_LIFE", "0")))
    sys.exit(int(code))
while True:
    signal.pause()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, seconds: float = 8.0) -> float:
    """How long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.01)
    return time.monotonic() - began


class Family:
    """Processes with a mark in their environment, which their children inherit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        (folder / "toy.py").write_text(TOY)
        self.mark = uuid.uuid4().hex
        self.port = free_port()
        self.nats_port = free_port()
        self.started: list[subprocess.Popen[str]] = []

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOECULE_", "HONCHO_"))}
        return kept | {
            "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
            "PYTHONPATH": str(self.folder),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.temporary),
            "FAMILY": self.mark,
            "MOECULE_PORT": str(self.port),
            "MOECULE_NATS_URL": f"nats://127.0.0.1:{self.nats_port}",
            **more,
        }

    def start(self, *command: str, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=REPO, env=self.environment(**more), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def supervise(self, *line: str, **more: str) -> subprocess.Popen[str]:
        return self.start("common.supervisor", *line, **more)

    def pids(self, what: str = "") -> list[int]:
        """Those alive; one that ended and was not waited for has no command line."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if line and what in line and f"FAMILY={self.mark}".encode() in (folder / "environ").read_bytes():
                        found.append(int(folder.name))
        return found

    def end(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    one = Family(tmp_path)
    yield one
    one.end()


def child_of(process: subprocess.Popen[str]) -> int:
    """The pid that the toy prints first; what the parent says before is skipped."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("child "):
            return int(line.split()[1])
    raise AssertionError("there was no child")


def rest(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=10)[0]


# ---- an actor's line


def test_a_killed_child_is_back_at_once(family: Family):
    parent = family.supervise("toy")
    first = child_of(parent)
    began = time.monotonic()
    os.kill(first, signal.SIGKILL)
    second = child_of(parent)
    assert second != first and time.monotonic() - began < 2
    os.kill(second, signal.SIGTERM)  # a child that was asked to leave is replaced too: a rolling restart
    assert child_of(parent) not in (first, second)


def test_back_off_grows_to_5_seconds():
    delays = [restart_delay(n) for n in range(1, 8)]
    assert delays[0] < 0.2 and delays == sorted(delays) and delays[-1] == 5.0


@pytest.mark.parametrize("code", [78, 69], ids=["configuration", "no NATS"])
def test_what_would_fail_again_ends_the_start(family: Family, code: int):
    parent = family.supervise("toy", TOY_EXIT=str(code))
    assert rest(parent).count("child") == 1 and parent.returncode == 78
    assert family.pids() == []


def test_a_crash_is_not_the_end(family: Family):
    parent = family.supervise("toy", TOY_EXIT="1")
    assert len({child_of(parent) for _ in range(3)}) == 3
    assert parent.poll() is None


def test_a_killed_parent_takes_its_child_along(family: Family):
    parent = family.supervise("toy")
    child = child_of(parent)
    assert child in family.pids()
    parent.kill()
    until(lambda: family.pids() == [])


def test_a_signal_to_the_group_reaches_the_child_once(family: Family):
    parent = family.supervise("toy", TOY_DRAIN="0.2")
    child = child_of(parent)
    assert os.getsid(child) == child != os.getsid(parent.pid)
    os.killpg(parent.pid, signal.SIGTERM)
    assert rest(parent) == "told to leave\nleft\n" and parent.returncode == 0
    assert family.pids() == []


def test_a_second_signal_kills_the_child(family: Family):
    parent = family.supervise("toy", TOY_DRAIN="60")
    child_of(parent)
    parent.terminate()
    assert parent.stdout is not None and parent.stdout.readline() == "told to leave\n"
    parent.send_signal(signal.SIGINT)
    assert rest(parent) == "" and family.pids() == []


def test_a_signal_during_back_off_ends_it(family: Family):
    parent = family.supervise("toy", TOY_EXIT="1")
    for _ in range(4):
        child_of(parent)
    parent.terminate()
    rest(parent)
    assert parent.returncode == 0 and family.pids() == []


# ---- what ends a start


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("MOECULE_MAX_BATCH", "many", "MOECULE_MAX_BATCH is 'many': use a whole number"),
        ("MOECULE_MODEL", "no/such", "there is no model folder 'no/such' (MOECULE_MODEL)"),
        (
            "MOECULE_NATS_URL",
            "ws://localhost:8080",
            "MOECULE_NATS_URL is 'ws://localhost:8080': use nats://HOST:PORT, or tls://HOST:PORT for a server with TLS",
        ),
        (
            "MOECULE_API_KEYS",
            "no/such",
            "MOECULE_API_KEYS: no/such: cannot be read: No such file or directory",
        ),
        ("MOECULE_HOST", "192.0.2.1", "MOECULE_HOST is '192.0.2.1': that is no address of this machine"),
        (
            "MOECULE_DEVICE",
            "cuda",
            "MOECULE_DEVICE is 'cuda', and this machine shows no NVIDIA GPU: unset it or use cpu",
        ),
    ],
)
def test_the_check_names_what_is_wrong(family: Family, setting: str, value: str, sentence: str):
    check = family.supervise("--check", **{setting: value})
    assert rest(check) == f"moecule: {sentence}\n" and check.returncode == 78


def test_the_check_finds_a_model_without_weights(family: Family, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((Path("models/tiny") / "config.json").read_bytes())
    check = family.supervise("--check", MOECULE_MODEL=str(tmp_path))
    assert "holds no .safetensors file: with MOECULE_WEIGHTS=random" in rest(check) and check.returncode == 78
    check = family.supervise("--check", MOECULE_MODEL=str(tmp_path), MOECULE_WEIGHTS="random")
    assert rest(check) == "" and check.returncode == 0
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "elsewhere/one.safetensors"}}')
    check = family.supervise("--check", MOECULE_MODEL=str(tmp_path))
    assert rest(check) == "" and check.returncode == 0, "files may lie where the index says"


def test_the_check_passes_and_says_nothing(family: Family):
    check = family.supervise("--check")
    assert rest(check) == "" and check.returncode == 0


@pytest.mark.parametrize("which", ["port", "nats_port"])
def test_a_taken_port_is_said(family: Family, which: str):
    port = getattr(family, which)
    with socket.create_server(("127.0.0.1", port)):
        check = family.supervise("--check")
        said = rest(check)
    assert check.returncode == 78 and said.count("\n") == 1 and f"127.0.0.1:{port}" in said and "taken" in said


def test_honcho_says_a_malformed_setting_once_and_leaves_nothing(family: Family):
    honcho = family.start("honcho", "start", "--no-colour", MOECULE_DRAIN_SECONDS="-1")
    said = rest(honcho)
    assert honcho.returncode == 78 and said.count("MOECULE_DRAIN_SECONDS is -1: use from 0 to 86400 s") == 1
    assert family.pids() == []


def test_lines_end_when_honcho_is_killed(family: Family):
    (family.folder / "Procfile").write_text("toy: exec python -m common.supervisor toy\n")
    honcho = family.start("honcho", "start", "-f", str(family.folder / "Procfile"), "-d", str(REPO))
    until(lambda: family.pids("-m toy") != [])
    honcho.kill()
    until(lambda: family.pids("toy") == [])


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.3, 0.5])
def test_serve_that_is_stopped_while_it_starts_leaves_nothing(family: Family, seconds: float):
    (family.folder / "Procfile").write_text("".join(f"{name}: exec python -m toy\n" for name in "abcdef"))
    serve = subprocess.Popen(
        [sys.executable, "-m", "common.serve", "a=2,b=0", "Procfile"], cwd=family.folder, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=family.environment(PYTHONPATH=f"{REPO}:{family.folder}"),
    )  # fmt: skip
    time.sleep(seconds)
    serve.send_signal(signal.SIGINT)
    assert serve.wait(8) in (130, -signal.SIGINT)  # the latter before it held signals back
    until(lambda: family.pids() == [])


def test_serve_counts_the_lines_of_a_formation(tmp_path: Path):
    (tmp_path / "Procfile").write_text("nats: x\nshard: y\nworker: z\n")
    assert lines_of("shard=4,worker=0", tmp_path / "Procfile") == 5 and lines_of("", tmp_path / "Procfile") == 3


@pytest.mark.parametrize("formation", ["shard=x", "shard=-1", "shard=", "shard", "worker=1,shard=2.5"])
def test_what_is_no_formation_is_refused(tmp_path: Path, formation: str):
    (tmp_path / "Procfile").write_text("shard: y\nworker: z\n")
    with pytest.raises(ConfigError, match="does not say how many processes: use a number, as in SHARDS=2"):
        lines_of(formation, tmp_path / "Procfile")
    with pytest.raises(ConfigError, match=r"'.*none' cannot be read: No such file"):
        lines_of("", tmp_path / "none")


def test_serve_says_what_it_was_given_in_one_line(family: Family):
    for arguments in (["gpu_worker=x"], ["", "nofile"]):
        serve = family.start("common.serve", *arguments)
        said = rest(serve)
        assert serve.returncode == 78 and said.startswith("moecule: ") and said.count("\n") == 1


def test_serve_takes_the_gpu_where_there_is_one_and_nobody_keeps_it_out(tmp_path: Path):
    without, with_one = {"PATH": str(tmp_path)}, {"PATH": str(tmp_path / "bin")}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").touch(mode=0o755)
    assert procfile_here(without, tmp_path) == "Procfile"
    assert procfile_here(with_one, tmp_path) == "Procfile.gpu"
    assert procfile_here(with_one | {"MOECULE_DEVICE": "CPU"}, tmp_path) == "Procfile"
    (tmp_path / ".env").write_text("MOECULE_DEVICE=cpu\n")
    assert procfile_here(with_one, tmp_path) == "Procfile"
    assert all((REPO / procfile).is_file() for procfile in ("Procfile", "Procfile.gpu"))


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 0.4])
def test_nats_that_is_stopped_while_it_starts_leaves_no_folder(family: Family, seconds: float):
    parent = family.supervise("--nats")
    time.sleep(seconds)  # wherever in its start that is, nothing may stay
    parent.terminate()
    parent.wait(10)
    assert list(family.temporary.iterdir()) == []


def test_whoever_is_stopped_for_a_while_goes_on(family: Family):
    """A wait for signals that is over by then gives back a siginfo without meaning."""
    parent = family.supervise("toy")
    child = child_of(parent)
    for _ in range(5):
        parent.send_signal(signal.SIGSTOP)
        time.sleep(0.3)  # longer than a wait
        parent.send_signal(signal.SIGCONT)
        time.sleep(0.2)
    assert parent.poll() is None and child in family.pids("toy")
    parent.terminate()
    assert rest(parent).splitlines() == ["told to leave", "left"] and parent.returncode == 0


@pytest.mark.parametrize(("code", "lives", "ends"), [(78, 1, True), (69, 1, True), (78, 2, False), (69, 2, False)])
def test_what_was_there_once_is_started_again(code: int, lives: int, ends: bool):
    """A file may be malformed for a while, or NATS refuse a password: that must not end the others."""
    assert ActorLine("services.gateway").ends_start(code, lives) is ends


def test_the_line_that_ends_a_start():
    line = ready_line(Settings(host="0.0.0.0", port=8123, model_name="small"))
    assert "http://127.0.0.1:8123/v1/chat/completions" in line and '"model": "small"' in line and "\n" not in line
    assert "authorization" not in line
    assert "-H 'authorization: Bearer YOUR_KEY'" in ready_line(Settings(api_keys="keys"))


def test_a_start_tells_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    answers = [(503, b'{"error": {"message": "no worker is running"}}'), (503, b"what?"), (200, b'{"status": "ready"}')]

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/ready"
            status, body = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(common.lines, "READY_SECONDS", 0.0)
    monkeypatch.setattr(common.lines, "WAITING_SECONDS", 0.0)
    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        line = ActorLine("services.gateway")
        line._settings = Settings(port=server.server_port)
        for left in (2, 1, 0, 0):  # what is ready is asked no more
            thread = threading.Thread(target=server.handle_request) if answers else None
            if thread:
                thread.start()
            line.tick()
            if thread:
                thread.join()
            assert len(answers) == left
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Moecule is not ready yet: no worker is running"
    assert len(said) == 2 and said[1].startswith("Moecule is ready at ")


# ---- NATS's line


async def connected(family: Family) -> NatsBus:
    bus = NatsBus(f"nats://127.0.0.1:{family.nats_port}", "test")
    await bus.connect()
    return bus


async def test_nats_is_kept_alive_in_memory_alone(family: Family):
    parent = family.supervise("--nats")
    bus = await connected(family)
    assert bus.max_payload == 8 * 1024 * 1024 or bus.max_payload == 8_000_000
    await bus.kv_put("maps", "map", b"1", 0)
    await asyncio.to_thread(until, lambda: list(family.temporary.iterdir()) == [])
    (server,) = family.pids("nats-server -c")
    back = asyncio.Event()

    async def on_reconnect() -> None:
        back.set()

    bus.on_reconnect(on_reconnect)
    os.kill(server, signal.SIGKILL)
    await asyncio.wait_for(back.wait(), 5)
    assert await bus.kv_get("maps", "map") is None and await bus.kv_put("maps", "map", b"2", 0) > 0
    await asyncio.to_thread(until, lambda: list(family.temporary.iterdir()) == [])
    await bus.close()
    parent.kill()
    await asyncio.to_thread(until, lambda: family.pids() == [])


async def test_nats_goes_last(family: Family):
    parent = family.supervise("--nats")
    bus = await connected(family)
    await asyncio.to_thread(until, lambda: list(family.temporary.iterdir()) == [])
    parent.terminate()
    await asyncio.sleep(0.5)
    assert bus.connected and parent.poll() is None, "somebody is still there"
    await bus.close()
    began = time.monotonic()
    await asyncio.to_thread(rest, parent)
    assert parent.returncode == 0 and time.monotonic() - began < 2
    assert family.pids() == [] and list(family.temporary.iterdir()) == []


async def test_nats_does_not_wait_for_ever(family: Family):
    parent = family.supervise("--nats", MOECULE_DRAIN_SECONDS="0.2")
    bus = await connected(family)
    began = time.monotonic()
    parent.terminate()
    await asyncio.to_thread(rest, parent)
    assert parent.returncode == 0 and 0.7 < time.monotonic() - began < 4 and family.pids() == []
    await bus.close()


async def test_nats_reads_its_configuration_again_when_its_parent_hangs_up(family: Family):
    """What is in its log is what it did: whoever took the parent's pid for the server's would else see nothing."""
    secrets = write_secrets(family.folder)
    conf = str(secrets / CONF.name)
    parent = family.supervise("--nats", MOECULE_NATS_CONF=conf)
    assert parent.stdout is not None
    await asyncio.to_thread(until, lambda: list(family.temporary.iterdir()) == [] and family.pids("nats-server -c"))
    (server,) = family.pids("nats-server -c")
    write_passwords(secrets, gateway="new")
    (secrets / "gateway").write_text("new\n")
    settings = Settings(nats_passwords=str(secrets), nats_ca=str(secrets / "ca.pem"))
    bus = NatsBus(f"tls://127.0.0.1:{family.nats_port}", "t", lambda: Login.of(settings, "gateway"))
    parent.send_signal(signal.SIGHUP)
    line = ""
    while "Reloaded server configuration" not in line:
        line = await asyncio.to_thread(parent.stdout.readline)
        assert line, "it ended"
    await bus.connect()
    await bus.close()
    assert family.pids("nats-server -c") == [server]
    parent.terminate()
    await asyncio.to_thread(rest, parent)
    assert parent.returncode == 0 and list(family.temporary.iterdir()) == []


def test_a_taken_nats_port_ends_the_start(family: Family):
    with socket.create_server(("127.0.0.1", family.nats_port)):
        parent = family.supervise("--nats")
        said = rest(parent)
    assert parent.returncode == 78 and said.count("\n") == 1 and str(family.nats_port) in said


def test_nats_elsewhere_is_not_started_here(family: Family):
    parent = family.supervise("--nats", MOECULE_NATS_URL="nats://192.0.2.1:4222", MOECULE_PROT="1")
    assert parent.stdout is not None
    assert parent.stdout.readline() == "moecule: MOECULE_PROT is no setting; did you mean MOECULE_PORT? (ignored)\n"
    assert "expected at 192.0.2.1:4222" in parent.stdout.readline()
    parent.terminate()
    rest(parent)
    assert parent.returncode == 0

"""The lines of the Procfile: an actor, and NATS. They say what to run, and what their parent watches."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from common.errors import EXIT_CONFIG, EXIT_UNAVAILABLE, ConfigError
from common.preflight import (
    check_device,
    check_http_port,
    check_model,
    check_model_folder,
    check_nats_port,
    nats_address,
    shortfalls,
)
from common.settings import Settings, unknown_settings

LAST_WORDS_SECONDS = 0.6  # after the drain; honcho kills 5 s after it told everyone to leave
READY_SECONDS = 0.5  # between two looks at /ready
WAITING_SECONDS = 15.0  # between two lines that say why it is not
NATS_CONF = Path(__file__).resolve().parent.parent / "nats.conf"
LISTEN, ESTABLISHED = "0A", "01"  # states in /proc/net/tcp


class ActorLine:
    signals: frozenset[signal.Signals] = frozenset()
    warnings: tuple[str, ...] = ()

    def __init__(self, module: str) -> None:
        self.name = module
        self._settings: Settings | None = None
        self._announced = not module.endswith(".gateway")
        self._asked_at = 0.0
        self._told_at = time.monotonic()

    def check(self) -> None:
        self._settings = Settings.from_env()
        check_device(self._settings)
        check_model_folder(self._settings)
        if not self._announced:
            try:
                check_http_port(self._settings)
            except ConfigError as error:
                raise ConfigError(error.message, param=self.name) from None  # nobody else finds this

    def command(self) -> list[str]:
        return [sys.executable, "-m", self.name]

    def tick(self) -> None:
        """The gateway's parent tells when the cluster can be used, the last line of a start, and what it waits for."""
        now = time.monotonic()
        if self._announced or self._settings is None or now - self._asked_at < READY_SECONDS:
            return
        self._asked_at = now
        why = why_not_ready(self._settings.host, self._settings.port)
        if why is None:
            self._announced = True
            print(ready_line(self._settings), flush=True)
        elif why and now - self._told_at >= WAITING_SECONDS:
            self._told_at = now
            print(f"Moecule is not ready yet: {why}", flush=True)

    def may_stop(self, waited: float) -> bool:
        return True

    def ends_start(self, code: int, lives: int) -> bool:
        """Later a file may be malformed, or NATS refuse a password, for as long as it takes to mend that."""
        return code in (EXIT_CONFIG, EXIT_UNAVAILABLE) and lives == 1

    def close(self) -> None:
        pass


class NatsLine:
    name = "nats-server"
    signals = frozenset({signal.SIGHUP})  # it reads its configuration again
    warnings: tuple[str, ...] = ()  # of what all lines share: one speaks for them

    def __init__(self) -> None:
        self._address = ("", 0)
        self._conf = NATS_CONF
        self._local = True
        self._store: str | None = None
        self._came_up = False
        self._up = False  # in this life
        self._patience = 0.0  # seconds

    def check(self) -> None:
        settings = Settings.from_env()
        check_device(settings)
        config = check_model(settings)
        self._patience = settings.drain_seconds + LAST_WORDS_SECONDS
        self._conf = Path(settings.nats_conf) if settings.nats_conf else NATS_CONF
        if not self._conf.is_file():
            raise ConfigError(f"there is no file {settings.nats_conf!r} (MOECULE_NATS_CONF)")
        self._address = nats_address(settings)
        self._local = check_nats_port(settings)
        self.warnings = (*(f"{one} (ignored)" for one in unknown_settings()), *shortfalls(settings, config))

    def command(self) -> list[str]:
        host, port = self._address
        if not self._local:
            print(f"moecule: NATS is expected at {host}:{port}; none is started here", file=sys.stderr, flush=True)
            return []
        self.close()
        self._store, self._up = tempfile.mkdtemp(prefix="moecule-nats-"), False
        return [nats_binary(), "-c", str(self._conf), "-a", host, "-p", str(port), "-sd", self._store]

    def tick(self) -> None:
        # The server wants a folder to start with, and writes to it only where it reads a configuration with TLS again:
        # so nothing is left behind by kill -9.
        if not self._up and sockets_on(self._address[1], LISTEN):
            self._came_up = self._up = True
            self.close()

    def may_stop(self, waited: float) -> bool:
        """The others say goodbye over NATS, so they go first."""
        return waited > self._patience or sockets_on(self._address[1], ESTABLISHED) == 0

    def ends_start(self, code: int, lives: int) -> bool:
        if self._came_up:
            return False
        print("moecule: NATS did not come up; its reason stands above", file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        if self._store:
            shutil.rmtree(self._store, ignore_errors=True)


def nats_binary() -> str:
    """The package's beside this Python, else whichever is on the PATH."""
    return shutil.which("nats-server", path=str(Path(sys.executable).parent)) or "nats-server"


def sockets_on(port: int, state: str) -> int:
    """TCP sockets of this machine with this local port in this state."""
    wanted, count = f":{port:04X}", 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        count += sum(1 for _, local, _, held, *_ in map(str.split, rows) if held == state and local.endswith(wanted))
    return count


def why_not_ready(host: str, port: int) -> str | None:
    """What /ready gives as its reason; None where it answers 200, empty where nobody answers. A socket alone: an HTTP
    client would triple the parent's memory."""
    try:
        with socket.create_connection((reachable(host), port), timeout=0.5) as connection:
            connection.sendall(b"GET /ready HTTP/1.0\r\nHost: localhost\r\n\r\n")
            answer = b""
            while part := connection.recv(4096):
                answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        return None if head.split(b" ")[1:2] == [b"200"] else json.loads(body)["error"]["message"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def ready_line(settings: Settings) -> str:
    host = reachable(settings.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    question = {"role": "user", "content": "What is 47 + 85?"}
    body = shlex.quote(json.dumps({"model": settings.served_name, "messages": [question]}))
    key = "-H 'authorization: Bearer YOUR_KEY' " if settings.api_keys else ""
    curl = f"curl {url}/v1/chat/completions {key}-H 'content-type: application/json' -d {body}"
    return f"Moecule is ready at {url} - try: {curl}"

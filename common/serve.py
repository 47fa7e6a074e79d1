"""What `make serve` runs: honcho with the formation and the Procfile given, or with the Procfile for this machine, and
Ctrl-C held back until all lines run.

honcho 2.0 that is signalled while it still starts its lines fails over one whose pid it has not been told, and leaves
the others running.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from honcho.environ import parse

from common.errors import EXIT_CONFIG, ConfigError

FORMATION = "expert_shard=2,gpu_worker=1"  # of which a Procfile takes the lines that it has
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
LONGEST_START_SECONDS = 5.0
LONGEST_STOP_SECONDS = 7.0  # honcho itself kills after 5
SETTLE_SECONDS = 0.3  # from a line's start to honcho's knowing its pid


def procfile_here(environ: Mapping[str, str] = os.environ, folder: Path = Path()) -> str:
    """On a machine with a GPU one process holds a worker and all experts, unless MOECULE_DEVICE=cpu keeps the GPU out.
    As with honcho, a .env file in `folder` wins over `environ`."""
    dotenv = folder / ".env"
    told = {**environ, **(parse(dotenv.read_text()) if dotenv.is_file() else {})}
    wanted = told.get("MOECULE_DEVICE", "").strip().lower() != "cpu"
    return "Procfile.gpu" if wanted and shutil.which("nvidia-smi", path=told.get("PATH")) else "Procfile"


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def lines_run(honcho: int, lines: int) -> bool:
    """honcho starts a process for each line, and that the line itself."""
    return sum(bool(children(child)) for child in children(honcho)) >= lines


def lines_of(formation: str, procfile: Path) -> int:
    """How many processes `honcho start -c formation` starts. Raises ConfigError where that is no formation, or there is
    no such file."""
    try:
        names = [line.partition(":")[0] for line in procfile.read_text().splitlines() if ":" in line]
    except OSError as error:
        raise ConfigError(f"the Procfile {str(procfile)!r} cannot be read: {error.strerror}") from None
    wanted: dict[str, int] = {}
    for part in filter(None, formation.split(",")):
        name, _, count = part.partition("=")
        if not count.isdecimal():
            raise ConfigError(f"{part!r} does not say how many processes: use a number, as in SHARDS=2")
        wanted[name] = int(count)
    return sum(wanted.get(name, 1) for name in names)


def _as_child() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: honcho ends with us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS | {signal.SIGCHLD})


def _end(honcho: subprocess.Popen[bytes]) -> None:
    """One whose output nobody reads any more hears no signal."""
    lines = [line for each in children(honcho.pid) for line in children(each)]
    honcho.kill()
    honcho.wait()
    for line in lines:
        with contextlib.suppress(ProcessLookupError):
            os.kill(line, signal.SIGTERM)


def main(formation: str = FORMATION, procfile: str = "") -> int:
    procfile = procfile or procfile_here()
    try:
        lines = lines_of(formation, Path(procfile))
    except ConfigError as error:
        print(f"moecule: {error.message}", file=sys.stderr)
        return EXIT_CONFIG
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS | {signal.SIGCHLD})
    honcho = subprocess.Popen(
        [sys.executable, "-m", "honcho", "-f", procfile, "start", "-c", formation],
        start_new_session=True,
        preexec_fn=_as_child,
    )
    began = time.monotonic()
    while honcho.poll() is None and not lines_run(honcho.pid, lines):
        if time.monotonic() - began > LONGEST_START_SECONDS:
            break
        time.sleep(0.02)
    time.sleep(SETTLE_SECONDS)
    deadline = float("inf")
    while honcho.poll() is None:
        told = signal.sigtimedwait(SIGNALS | {signal.SIGCHLD}, 1.0)
        if told is not None and told.si_signo != signal.SIGCHLD:
            honcho.send_signal(told.si_signo if told.si_signo != signal.SIGHUP else signal.SIGTERM)
            deadline = min(deadline, time.monotonic() + LONGEST_STOP_SECONDS)
        if time.monotonic() > deadline:
            _end(honcho)
    return honcho.returncode if honcho.returncode >= 0 else 128 - honcho.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))

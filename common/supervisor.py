"""The small parent of every Procfile line: `python -m common.supervisor services.gateway`, or `--nats`, or `--check`.

honcho ends everything when one line ends, signals a line's process group, and kills it 5 s later. So the parent stays,
restarts its child when that crashes, and runs it in a session of its own that dies with the parent. NATS goes last.
This imports nothing heavy: it must be there at once.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from typing import Protocol

from common.cli import EXIT_USAGE
from common.errors import EXIT_CONFIG, ConfigError
from common.lines import ActorLine, NatsLine
from common.preflight import check_all
from common.settings import Settings

USAGE = "use: python -m common.supervisor services.<actor> | --nats | --check"
TICK_SECONDS = 0.1
LONG_LIFE_SECONDS = 10.0  # a child that lived so long is restarted as if for the first time
OTHERS_SPEAK_SECONDS = 3.0
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}

# Runs before the child's own program. PR_SET_PDEATHSIG survives exec; a parent that died before it shows in getppid.
SHIM = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Line(Protocol):
    """What one line of the Procfile runs."""

    name: str
    signals: frozenset[signal.Signals]  # that are for the child, and sent on to it
    warnings: tuple[str, ...]  # what `check` found that does not end a start

    def check(self) -> None:
        """Raises ConfigError if a start is in vain."""
        ...

    def command(self) -> list[str]:
        """For one life; called again before each restart. Empty: there is nothing to run here."""
        ...

    def tick(self) -> None:
        """Called about ten times a second while the child runs."""
        ...

    def may_stop(self, waited: float) -> bool:
        """Whether the child may be told to leave, `waited` seconds after the parent was."""
        ...

    def ends_start(self, code: int, lives: int) -> bool:
        """Whether a child that ended with `code` in its `lives`-th life would fail again."""
        ...

    def close(self) -> None:
        """Nothing more is run: remove what was made for it."""
        ...


def start_child(command: Sequence[str]) -> subprocess.Popen[bytes]:
    shim = [sys.executable, "-I", "-S", "-c", SHIM, str(os.getpid()), *command]
    return subprocess.Popen(shim, start_new_session=True)


def restart_delay(crashes: int) -> float:
    """Seconds before the restart after so many crashes in a row: at once, then up to 5 s."""
    return min(5.0, 0.1 * 3 ** (crashes - 1))


class Supervisor:
    def __init__(self, line: Line) -> None:
        self._line = line
        self._stops = 0  # how often we were told to stop
        self._told_at = 0.0
        self._watch = AncestorWatch()

    def run(self) -> int:
        """Until the line was told to stop (0) or cannot start (the exit code that says so)."""
        try:
            return self._live()
        finally:
            self._line.close()

    def _live(self) -> int:
        lives = crashes = 0
        while not self._stops:
            lives += 1
            began = time.monotonic()
            if not (command := self._line.command()):
                self._wait(None)
                return 0
            code = self._wait(start_child(command))
            if self._stops:
                return 0
            if self._line.ends_start(code, lives):
                return EXIT_CONFIG
            crashes = 1 if time.monotonic() - began > LONG_LIFE_SECONDS else crashes + 1
            delay = restart_delay(crashes)
            say(f"{self._line.name} {how_it_ended(code)}: restart in {delay:.1f} s")
            self._pause(delay)
        return 0

    def _wait(self, child: subprocess.Popen[bytes] | None) -> int:
        """The exit code of the child, which is told to stop when we are; without one, until we are told."""
        told = False
        while (code := child.poll() if child else (0 if self._stops else None)) is None:
            self._take_signal(TICK_SECONDS, child)
            self._line.tick()
            if child is None or not self._stops:
                continue
            if self._stops > 1:
                child.kill()
            elif not told and self._line.may_stop(time.monotonic() - self._told_at):
                child.terminate()
                told = True
        return code

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stops and (left := end - time.monotonic()) > 0:
            self._take_signal(min(left, TICK_SECONDS))

    def _take_signal(self, seconds: float, child: subprocess.Popen[bytes] | None = None) -> None:
        """Signals are blocked and taken here alone, so that none can come between a look and a wait."""
        taken = take_signal(SIGNALS | self._line.signals, seconds)
        if taken in self._line.signals:
            if child:
                child.send_signal(taken)
            return
        if taken in (signal.SIGTERM, signal.SIGINT) or (not self._stops and self._watch.gone()):
            self._stops += 1
            self._told_at = self._told_at or time.monotonic()


def take_signal(signals: Collection[int], seconds: float) -> int:
    """The one that came in that time, or 0. Where a process was stopped meanwhile and goes on after the time is over,
    Python gives back a siginfo that nobody has filled in."""
    info = signal.sigtimedwait(signals, seconds)
    return info.si_signo if info is not None and info.si_signo in signals else 0


class AncestorWatch:
    """Our parent, and honcho above it: when they are killed, nobody is left to tell us to stop."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._honcho = -1
        self._orphaned = False
        if "HONCHO_PROCESS_NAME" in os.environ:
            try:
                with open(f"/proc/{self._parent}/stat") as stat:
                    grandparent = int(stat.read().rpartition(")")[2].split()[1])
                self._honcho = os.pidfd_open(grandparent)
                with open(f"/proc/{grandparent}/cmdline") as command:
                    self._orphaned = "honcho" not in command.read()  # it ended before we began to watch
            except (OSError, IndexError):
                self._orphaned = True

    def gone(self) -> bool:
        if self._orphaned or os.getppid() != self._parent:
            return True
        return self._honcho >= 0 and bool(select.select([self._honcho], [], [], 0)[0])


def how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def say(sentence: str) -> None:
    print(f"moecule: {sentence}", file=sys.stderr, flush=True)


def refuse(error: ConfigError, line: Line | None) -> int:
    """Say once why there is no start. Every line finds a fault that all share, and NATS's line speaks for them."""
    own_fault = line is None or isinstance(line, NatsLine) or error.param == line.name
    if not own_fault and "HONCHO_PROCESS_NAME" in os.environ and take_signal(SIGNALS, OTHERS_SPEAK_SECONDS):
        return EXIT_CONFIG  # somebody spoke, and honcho stops us
    say(error.message)
    return EXIT_CONFIG


def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(f"{__doc__}\n{USAGE}")
        return 0
    if len(arguments) != 1:
        say(USAGE)
        return EXIT_USAGE
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    line: Line | None = None
    try:
        if arguments[0] == "--check":
            check_all(Settings.from_env())
            return 0
        line = NatsLine() if arguments[0] == "--nats" else ActorLine(arguments[0])
        line.check()
    except ConfigError as error:
        return refuse(error, line)
    for sentence in line.warnings:
        say(sentence)
    signal.pthread_sigmask(signal.SIG_BLOCK, line.signals)
    return Supervisor(line).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

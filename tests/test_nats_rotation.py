"""A password or a certificate that is changed while actors run, against a real server that is told to reload: they come
back by themselves, and the log says what to do while they cannot."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from common.clock import FakeClock
from common.errors import ConfigError
from common.nats_bus import MOST_REASONS, REPEAT_SECONDS, NatsBus, Reminder
from common.nats_login import MOST_BYTES, Login
from common.settings import Settings
from tests.conftest import NatsServer
from tests.test_nats_users import CONF, write_certificate, write_passwords, write_secrets

GONE, BACK = "NATS is gone: connecting again", "NATS is back"


class Counted(Reminder):
    """Knows how often it was asked: once a refused attempt."""

    asked = 0

    def is_due(self, reason: str) -> bool:
        self.asked += 1
        return super().is_due(reason)


class Rig:
    """A server, its secrets, and a gateway's bus on a clock that stands still."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_secrets(folder)
        self.server = NatsServer(folder / CONF.name)
        self.clock = FakeClock()
        self.reminder = Counted(self.clock.now)
        self.bus = self.bus_of(Settings(nats_passwords=str(folder), nats_ca=str(folder / "ca.pem")))

    def bus_of(self, settings: Settings) -> NatsBus:
        url = f"tls://127.0.0.1:{self.server.port}"
        return NatsBus(url, "test", partial(Login.of, settings, "gateway"), self.reminder)

    async def attempts(self, count: int) -> None:
        """Until so many more have been refused."""
        wanted = self.reminder.asked + count
        await until(lambda: self.reminder.asked >= wanted)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    try:
        await rig.bus.connect()
        yield rig
    finally:
        await rig.bus.close()
        rig.server.kill()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def told(logs: list[Any]) -> list[str]:
    """All that a log without debug lines shows."""
    return [line["event"] for line in logs if line["log_level"] != "debug"]


async def test_a_new_password_needs_no_restart(rig: Rig) -> None:
    old = rig.bus_of(Settings(nats_passwords=str(rig.folder), nats_ca=str(rig.folder / "ca.pem")))
    write_passwords(rig.folder, gateway="another")
    (rig.folder / "gateway").write_text("another\n")
    with capture_logs() as logs:
        await asyncio.to_thread(rig.server.reload)
        await until(lambda: BACK in told(logs))
    assert rig.bus.connected and told(logs) == [GONE, BACK]
    (rig.folder / "gateway").write_text("password of the gateway\n")
    with pytest.raises(ConfigError, match="does not let gateway in"):
        await old.connect()
    await old.close()


async def test_a_new_certificate_needs_no_restart(rig: Rig) -> None:
    old = (rig.folder / "ca.pem").read_bytes()
    write_certificate(rig.folder)
    with capture_logs() as logs:
        await asyncio.to_thread(rig.server.reload)
        assert rig.bus.connected and told(logs) == [], "who is connected stays so"
        await rig.bus._client.force_reconnect()
        await until(lambda: BACK in told(logs))
    assert told(logs) == [GONE, BACK]
    (rig.folder / "ca.pem").write_bytes(old)
    late = rig.bus_of(Settings(nats_ca=str(rig.folder / "ca.pem")))
    with pytest.raises(ConfigError, match="is not known"):
        await late.connect()
    await late.close()


async def test_a_refused_password_is_told_now_and_then(rig: Rig) -> None:
    url = f"tls://127.0.0.1:{rig.server.port}"
    why = f"NATS at {url} does not let gateway in (nats: 'Authorization Violation')"
    refused = f"{why}: see MOECULE_NATS_PASSWORDS; trying on"
    write_passwords(rig.folder, gateway="another")
    with capture_logs() as logs:
        await asyncio.to_thread(rig.server.reload)
        await rig.attempts(4)
        assert told(logs) == [GONE, refused]
        assert [line["log_level"] for line in logs if line["event"] == refused] == ["error"]
        rig.clock.jump(REPEAT_SECONDS)
        await rig.attempts(4)
        assert told(logs) == [GONE, refused, refused]
        (rig.folder / "gateway").write_text("another\n")
        await until(lambda: BACK in told(logs))
        assert rig.bus.connected and told(logs) == [GONE, refused, refused, BACK]

        logs.clear()
        write_passwords(rig.folder, gateway="a third")
        await asyncio.to_thread(rig.server.reload)
        await rig.attempts(1)
        assert told(logs) == [GONE, refused], "at once, since it was back"
    assert "another" not in str(logs)


async def test_an_unknown_certificate_is_told_now_and_then(rig: Rig) -> None:
    known = (rig.folder / "ca.pem").read_bytes()
    write_certificate(rig.folder)
    new = (rig.folder / "ca.pem").read_bytes()
    (rig.folder / "ca.pem").write_bytes(known)
    with capture_logs() as logs:
        await asyncio.to_thread(rig.server.restart)
        await rig.attempts(4)
        gone, refused = told(logs)
        assert gone == GONE and refused.startswith(f"NATS at tls://127.0.0.1:{rig.server.port} is not known: ")
        assert "certificate verify failed" in refused and refused.endswith("; see MOECULE_NATS_CA; trying on")
        rig.clock.jump(REPEAT_SECONDS)
        await rig.attempts(4)
        assert told(logs) == [GONE, refused, refused]
        (rig.folder / "ca.pem").write_bytes(new)
        await until(lambda: BACK in told(logs))
    assert rig.bus.connected and told(logs) == [GONE, refused, refused, BACK]


async def test_a_server_that_has_lost_its_tls_is_told_now_and_then(rig: Rig) -> None:
    shown: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.12.0","max_payload":1048576,"headers":true}\r\n')
        shown.append(await reader.read())  # until the actor closes its socket
        writer.close()

    with capture_logs() as logs:
        rig.server.kill()
        async with await asyncio.start_server(serve, "127.0.0.1", rig.server.port):
            await until(lambda: len(shown) >= 4)
            await rig.bus.close()
    assert set(shown) == {b""}, "no password"
    url = f"tls://127.0.0.1:{rig.server.port}"
    assert told(logs) == [GONE, f"NATS at {url} has no TLS, which tls:// or MOECULE_NATS_CA demands; trying on"]


async def test_refused_attempts_leave_no_sockets(tmp_path: Path) -> None:
    conf, password = tmp_path / "nats.conf", tmp_path / "gateway"
    text = 'listen: "127.0.0.1:-1"\nauthorization { users = [{user: gateway, password: "%s"}] }\n'
    conf.write_text(text % "first")
    password.write_text("first")
    server, reminder = NatsServer(conf), Counted()
    bus = NatsBus(server.url, "test", partial(Login.of, Settings(nats_passwords=str(tmp_path)), "gateway"), reminder)
    try:
        await bus.connect()
        before = len(os.listdir("/proc/self/fd"))
        conf.write_text(text % "second")
        await asyncio.to_thread(server.reload)
        await until(lambda: reminder.asked >= 8)
        assert len(os.listdir("/proc/self/fd")) <= before + 1
    finally:
        await bus.close()
        server.kill()


@pytest.mark.parametrize(
    ("name", "holds", "why"),
    [
        ("gateway", None, r"gateway \(MOECULE_NATS_PASSWORDS\) cannot be read: No such file or directory"),
        ("gateway", b"\n", r"gateway \(MOECULE_NATS_PASSWORDS\) is empty"),
        ("gateway", b"\xff", r"gateway \(MOECULE_NATS_PASSWORDS\) cannot be read: it is not text"),
        ("gateway", os.mkfifo, r"gateway \(MOECULE_NATS_PASSWORDS\) cannot be read: it is no regular file"),
        ("gateway", b"x" * (MOST_BYTES + 1), r"gateway \(MOECULE_NATS_PASSWORDS\) is larger than 1048576 bytes"),
        ("ca.pem", os.mkfifo, r"ca\.pem \(MOECULE_NATS_CA\) cannot be read: it is no regular file"),
        ("ca.pem", None, r"ca\.pem \(MOECULE_NATS_CA\) cannot be read: No such file or directory"),
        ("ca.pem", b"half a cert", r"ca\.pem \(MOECULE_NATS_CA\) holds no certificate that can be read"),
    ],
    ids=[
        "no password",
        "an empty one",
        "no text",
        "a FIFO",
        "a large one",
        "a FIFO as certificate",
        "no certificate",
        "a malformed one",
    ],
)
async def test_what_cannot_be_read_stays_as_it_was_and_is_told_once_an_outage(
    rig: Rig, name: str, holds: bytes | Callable[[Path], object] | None, why: str
) -> None:
    path = rig.folder / name
    good = path.read_bytes()
    path.unlink()
    if isinstance(holds, bytes):
        path.write_bytes(holds)
    elif holds is not None:
        holds(path)
    with capture_logs() as logs:
        for outage in (1, 2):
            await asyncio.to_thread(rig.server.restart)
            await until(lambda outage=outage: told(logs).count(BACK) == outage)
        path.unlink(missing_ok=True)
        path.write_bytes(good)
        await asyncio.to_thread(rig.server.restart)
        await until(lambda: told(logs).count(BACK) == 3)
        path.unlink()
        await asyncio.to_thread(rig.server.restart)
        await until(lambda: told(logs).count(BACK) == 4)
    assert rig.bus.connected
    warned = [line for line in logs if line["event"] not in (GONE, BACK) and line["log_level"] != "debug"]
    assert [line["log_level"] for line in warned] == ["warning"] * 3, "once an outage"
    assert re.search(why, warned[0]["event"])
    assert warned[0]["event"].endswith("; mend it: until then NATS gets what was read before")
    assert "password of the gateway" not in str(logs)


async def test_an_ordinary_outage_is_told_by_two_lines(rig: Rig) -> None:
    with capture_logs() as logs:
        rig.server.kill()
        await until(lambda: len([line for line in logs if line["log_level"] == "debug"]) >= 4)
        await asyncio.to_thread(rig.server.start)
        await until(lambda: BACK in told(logs))
    assert told(logs) == [GONE, BACK]


def test_a_reminder_tells_of_each_reason_at_once_and_then_every_so_often() -> None:
    clock = FakeClock()
    reminder = Reminder(clock.now)
    assert [reminder.is_due(reason) for reason in ("a", "a", "b", "a")] == [True, False, True, False]
    clock.jump(REPEAT_SECONDS - 1)
    assert not reminder.is_due("a")
    clock.jump(1)
    assert [reminder.is_due(reason) for reason in ("a", "a")] == [True, False]
    reminder.forget()
    assert reminder.is_due("a")


def test_a_reminder_tells_of_so_many_reasons_and_keeps_no_more() -> None:
    clock = FakeClock()
    reminder = Reminder(clock.now)
    assert sum(reminder.is_due(str(n)) for n in range(100)) == MOST_REASONS
    clock.jump(REPEAT_SECONDS)
    assert sum(reminder.is_due(str(n)) for n in range(100)) == MOST_REASONS

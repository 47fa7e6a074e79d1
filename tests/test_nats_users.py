"""docs/nats-users.conf: a whole cluster over TLS, each kind of actor as a user of its own, and what such a user may not
say."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from benchmarks.cluster import Cluster, cluster
from common.errors import ConfigError
from common.nats_bus import CONNECT_SECONDS, NatsBus, OrderedClient
from common.nats_login import Login
from common.preflight import check_nats_users
from common.settings import Settings
from tests.conftest import NatsServer

CONF = Path(__file__).parent.parent / "docs" / "nats-users.conf"
KINDS = ("gateway", "scheduler", "worker", "shard", "service")


def write_certificate(folder: Path) -> None:
    """Of the server, by a new authority."""
    authority = trustme.CA()
    server = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    server.private_key_pem.write_to_path(str(folder / "key.pem"))
    (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))


def write_passwords(folder: Path, **passwords: str) -> None:
    """In the server's configuration. Those of the actors are the files named after them."""
    told = {"host": "127.0.0.1", "tls_cert": str(folder / "cert.pem"), "tls_key": str(folder / "key.pem")}
    told |= {f"{kind}_password": passwords.get(kind, f"password of the {kind}") for kind in KINDS}
    (folder / "secrets.conf").write_text("".join(f'{name}: "{value}"\n' for name, value in told.items()))


def write_secrets(folder: Path) -> Path:
    """What the README's commands make."""
    write_certificate(folder)
    write_passwords(folder)
    for kind in KINDS:
        (folder / kind).write_text(f"password of the {kind}\n")
    shutil.copy(CONF, folder)
    return folder


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_secrets(tmp_path_factory.mktemp("secrets"))


@pytest.fixture
def url(secrets: Path) -> Iterator[str]:
    """A server with that configuration."""
    server = NatsServer(secrets / CONF.name)
    yield f"tls://127.0.0.1:{server.port}"
    server.kill()


class Known:
    """A user's plain connection, and what the server said against it."""

    def __init__(self, secrets: Path, url: str, user: str) -> None:
        self.refused: list[str] = []
        self._options: dict[str, Any] = {
            "user": user,
            "password": (secrets / user).read_text().strip(),
            "tls": ssl.create_default_context(cafile=str(secrets / "ca.pem")),
            "inbox_prefix": f"_INBOX.{user}",
            "error_cb": self._on_error,
        }
        self._url = url

    async def __aenter__(self) -> Known:
        self.client = OrderedClient()  # of nats-py alone a flush may come before what it should follow
        await self.client.connect(self._url, **self._options)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def _on_error(self, error: Exception) -> None:
        self.refused.append(str(error))

    async def flush(self) -> None:
        await self.client.flush()


@pytest.mark.parametrize(
    ("user", "subject", "heard_by"),
    [
        ("gateway", "moecule.v1.shard.s.load", "shard"),
        ("gateway", "moecule.v1.worker.w.allpages", "worker"),
        ("gateway", "moecule.v1.worker.w.pages", "scheduler"),
        ("gateway", "moecule.v1.worker.w.beat", "scheduler"),
        ("gateway", "moecule.v1.gateway.g.tokens", "gateway"),
        ("shard", "moecule.v1.worker.w.admit", "worker"),
        ("worker", "moecule.v1.shard.s.load", "shard"),
        ("service", "moecule.v1.worker.w.admit", "worker"),
        ("service", "moecule.v1.assign", "scheduler"),
    ],
)
async def test_nobody_says_what_is_not_theirs_to_say(
    secrets: Path, url: str, user: str, subject: str, heard_by: str
) -> None:
    async with Known(secrets, url, user) as sender, Known(secrets, url, heard_by) as receiver:
        heard = await receiver.client.subscribe(subject)
        await receiver.flush()
        await sender.client.publish(subject, b"x")
        await sender.flush()
        await receiver.flush()
        assert not receiver.refused
        assert heard.pending_msgs == 0
        assert any("permissions violation" in text.lower() for text in sender.refused), sender.refused


async def test_nobody_hears_another_users_answers(secrets: Path, url: str) -> None:
    async with Known(secrets, url, "service") as service:
        await service.client.subscribe("_INBOX.gateway.>")
        await service.flush()
        assert any("permissions violation" in text.lower() for text in service.refused)


async def test_a_wrong_password_ends_the_start_with_a_sentence(secrets: Path, url: str) -> None:
    ca = secrets / "ca.pem"
    bus = NatsBus(url, "test", lambda: Login("gateway", "guessed", str(ca), ca.read_bytes()))
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"does not let gateway in .*Authorization.*: see MOECULE_NATS_PASSWORDS"):
        await bus.connect()
    assert time.monotonic() - began < CONNECT_SECONDS / 2, "at the server's first word, not when patience ends"
    await bus.close()


async def test_a_server_whom_nobody_vouches_for_is_not_talked_to(secrets: Path, url: str) -> None:
    password = (secrets / "gateway").read_text().strip()
    bus = NatsBus(url, "test", lambda: Login("gateway", password))
    with pytest.raises(ConfigError, match=r"is not known: .*certificate verify failed.*; see MOECULE_NATS_CA"):
        await bus.connect()
    await bus.close()


async def test_a_password_is_not_shown_to_whoever_has_no_tls(secrets: Path, nats_url: str) -> None:
    password = (secrets / "gateway").read_text().strip()
    ca, heard = secrets / "ca.pem", bytearray()
    trusted = ca.read_bytes()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.12.0","max_payload":1048576,"headers":true}\r\n')
        heard.extend(await reader.read(4096))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for url in (f"tls://127.0.0.1:{port}", f"nats://127.0.0.1:{port}", nats_url):
            bus = NatsBus(url, "test", lambda: Login("gateway", password, str(ca), trusted))
            with pytest.raises(ConfigError, match="has no TLS, which tls:// or MOECULE_NATS_CA demands"):
                await bus.connect()
            await bus.close()
    assert not heard


@pytest.mark.parametrize("name", ["nats_passwords", "nats_ca"])
def test_a_server_of_ours_without_users_ends_the_start(secrets: Path, name: str) -> None:
    told = {name: str(secrets)}
    with pytest.raises(ConfigError, match=f"MOECULE_{name.upper()} is set, .*: set MOECULE_NATS_CONF"):
        check_nats_users(Settings(**told))
    check_nats_users(Settings(nats_conf=str(secrets / CONF.name), **told))


def test_a_missing_or_empty_password_is_told(tmp_path: Path) -> None:
    settings = Settings(nats_passwords=str(tmp_path))
    with pytest.raises(ConfigError, match=r"gateway.*cannot be read: No such file"):
        Login.of(settings, "gateway")
    (tmp_path / "gateway").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        Login.of(settings, "gateway")
    (tmp_path / "gateway").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="it is not text"):
        Login.of(settings, "gateway")


def test_a_missing_or_malformed_certificate_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    settings = Settings(nats_ca=str(path))
    with pytest.raises(ConfigError, match=r"ca\.pem \(MOECULE_NATS_CA\) cannot be read: No such file"):
        Login.of(settings, "gateway")
    path.write_text("")
    with pytest.raises(ConfigError, match=r"ca\.pem \(MOECULE_NATS_CA\) holds no certificate that can be read"):
        Login.of(settings, "gateway").options("nats://localhost")


def test_a_login_shows_no_password() -> None:
    assert "guessed" not in repr(Login("gateway", "guessed"))


@pytest.mark.cluster
def test_a_whole_cluster_of_users_over_tls(secrets: Path) -> None:
    told = {"nats_passwords": secrets, "nats_ca": secrets / "ca.pem", "nats_conf": secrets / CONF.name}
    nobody = "http://127.0.0.1:9"  # actors that trace say a word more to each other, whoever takes the traces
    with cluster(device="cpu", traces=nobody, **told) as running:
        body = {"model": "tiny", "prompt": "What is 2 + 2?", "max_tokens": 4, "n": 2}
        asked = urllib.request.Request(
            f"{running.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 8
        with urllib.request.urlopen(f"{running.url}/metrics", timeout=10) as answer:
            actors = answer.read().decode()
        assert all(f'actor="{kind}' in actors for kind in ("gateway", "worker", "shard", "scheduler"))
        told_over_nats = asyncio.run(_generate(secrets, f"tls://127.0.0.1:{running.nats_port}"))
        said = running.output()
    assert told_over_nats == ["accepted", "tokens", "end"]
    assert "ermissions" not in said and "uthorization" not in said, [
        line for line in said.splitlines() if "ermission" in line or "uthorization" in line
    ]


async def _generate(secrets: Path, url: str) -> list[str]:
    """The kinds of what a service hears that asks for tokens, each once."""
    kinds: dict[str, None] = {}
    async with Known(secrets, url, "service") as service:
        answers = await service.client.subscribe(inbox := service.client.new_inbox())
        body = {"model": "tiny", "prompt": "What is 2 + 2?", "max_tokens": 4}
        await service.client.publish("moecule.v1.generate", json.dumps(body).encode(), reply=inbox)
        async with asyncio.timeout(30):
            while not kinds or list(kinds)[-1] not in ("end", "error"):
                kinds[json.loads((await answers.next_msg(30)).data)["type"]] = None
        assert not service.refused
    return list(kinds)


def test_a_missing_configuration_of_nats_is_told() -> None:
    broken = Cluster(nats_conf="/nowhere.conf", device="cpu")
    try:
        assert broken.honcho.wait(30) == 78 or "MOECULE_NATS_CONF" in broken.output()
        assert "there is no file '/nowhere.conf' (MOECULE_NATS_CONF)" in broken.output()
    finally:
        broken.kill()
        broken.remove_log()

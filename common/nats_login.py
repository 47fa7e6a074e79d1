"""How an actor and a NATS server know each other, as the files of MOECULE_NATS_PASSWORDS and MOECULE_NATS_CA say."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import read_small
from common.settings import Settings

MOST_BYTES = 1 << 20  # of a file


@dataclass(frozen=True)
class Login:
    """Who has a `user` gets replies below that name, so that others can be kept from reading them."""

    user: str = ""
    password: str = field(default="", repr=False)
    ca: str = ""  # PEM file; empty: whom the system trusts
    ca_holds: bytes = field(default=b"", repr=False)  # what was read from it

    @classmethod
    def of(cls, settings: Settings, kind: str) -> Login:
        """As the files are now. Raises ConfigError."""
        user = password = ""
        if settings.nats_passwords:
            user, password = kind, _password(Path(settings.nats_passwords) / kind, kind)
        ca = settings.nats_ca
        return cls(user, password, ca, _read(Path(ca), "MOECULE_NATS_CA") if ca else b"")

    def options(self, url: str) -> dict[str, Any]:
        """Of nats-py's connect. Raises ConfigError."""
        found: dict[str, Any] = {}
        if self.user:
            found |= {"user": self.user, "password": self.password, "inbox_prefix": f"_INBOX.{self.user}"}
        if self.ca or url.startswith("tls:"):
            try:
                if self.ca and not self.ca_holds:
                    raise OSError("it is empty")
                # What is no ASCII are comments between the certificates.
                found["tls"] = ssl.create_default_context(cadata=self.ca_holds.decode("ascii", "replace") or None)
            except OSError as error:
                raise ConfigError(
                    f"{self.ca} (MOECULE_NATS_CA) holds no certificate that can be read: {error}"
                ) from None
        return found


def _password(path: Path, kind: str) -> str:
    try:
        password = _read(path, "MOECULE_NATS_PASSWORDS").decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} (MOECULE_NATS_PASSWORDS) cannot be read: it is not text") from None
    if not password:
        raise ConfigError(f"{path} (MOECULE_NATS_PASSWORDS) is empty: it holds the password of NATS's user {kind}")
    return password


def _read(path: Path, setting: str) -> bytes:
    try:
        _, data = read_small(path, MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} ({setting}) cannot be read: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path} ({setting}) is larger than {MOST_BYTES} bytes")
    return data

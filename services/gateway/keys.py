"""API keys: who may ask. Either front door hands Keys what the caller showed, and asks the Caller it gets for a permit.

The file that MOECULE_API_KEYS names has a line a key, in words with spaces between:

    # name    key, or its SHA-256            limits and rights, each may be left out
    alice     mk-Zq3hW0d7y5Jt1uBv9fXk2c
    nightly   sha256:9f86d081...b0f00a08     requests=64 tokens=200000 per_minute=600 priority=10
    ops       mk-4rTq8sLmN2vXw6yZb1cDf0      admin=1

`requests` and `tokens` are limits of what is in flight, `per_minute` of the requests of any 60 s; `priority` is what
its requests have, and the lowest number (the earliest turn) they may ask for; `admin` may do what concerns everyone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from common.clock import Clock
from common.errors import ConfigError, InvalidKey
from common.files import read_small
from services.gateway.limits import Caller, Key

LOOK_SECONDS = 1.0  # between two looks at whether the file has changed
MOST_BYTES = 4 << 20  # of the file
SHORTEST = 16  # characters of a key
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
SECRET = re.compile(rf"[!-~]{{{SHORTEST},512}}")
SHA256 = re.compile(r"sha256:([0-9a-fA-F]{64})")
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json", "/asyncapi.json"})
"""Where no key is asked for: whether it is alive, and pages that are the same for everyone. Metrics tell of others."""
ADMIN_PATHS = frozenset({"/reset_prefix_cache"})

_LIMITS = {"requests": (1, 10**6), "tokens": (1, 10**12), "per_minute": (1, 10**6), "priority": (-(10**6), 10**6)}


# ---- the file


class Malformed(Exception):
    """What is wrong with a line. It never repeats what the line says, which may be a key."""


def check_keys(path: str) -> None:
    """Raises ConfigError if Keys would."""
    with _needed(path):
        keys_in(read_small(path, MOST_BYTES)[1])


@contextlib.contextmanager
def _needed(path: str) -> Iterator[None]:
    """There is no start without it."""
    try:
        yield
    except (OSError, ValueError, Malformed) as error:
        raise ConfigError(f"MOECULE_API_KEYS: {path}: {_why(error)}") from None


def keys_in(data: bytes) -> tuple[Key, ...]:
    """Raises Malformed or UnicodeDecodeError."""
    if len(data) > MOST_BYTES:
        raise Malformed(f"it is larger than {MOST_BYTES} bytes")
    return parse(data.decode())


def parse(text: str) -> tuple[Key, ...]:
    """Raises Malformed."""
    keys: dict[str, Key] = {}
    names: dict[bytes, str] = {}  # by digest
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key = _parse_line(words)
            if key.name in keys:
                raise Malformed(f"the name {key.name!r} is there twice: give each key its own")
            if key.digest in names:
                raise Malformed(f"the key is the one of {names[key.digest]!r}: make another for {key.name!r}")
        except Malformed as error:
            raise Malformed(f"line {number}: {error}") from None
        keys[key.name], names[key.digest] = key, key.name
    if not keys:
        raise Malformed("there is no key in it: write a line `name key`, or unset MOECULE_API_KEYS to ask for none")
    return tuple(keys.values())


def _parse_line(words: list[str]) -> Key:
    if len(words) < 2:
        raise Malformed("write `name key`, and limits after it")
    name, secret, *limits = words
    if not NAME.fullmatch(name):
        raise Malformed("the name (the first word) must be 1 to 64 letters, digits, -, _ and .")
    return Key(name, _digest(secret), **_parse_limits(limits))


def _digest(secret: str) -> bytes:
    if secret.lower().startswith("sha256:"):
        if not (found := SHA256.fullmatch(secret)):
            raise Malformed("after sha256: there must be 64 hexadecimal digits")
        return bytes.fromhex(found.group(1))
    if not SECRET.fullmatch(secret):
        raise Malformed(f"the key must be {SHORTEST} to 512 characters of ASCII: make one as the README says")
    return digest_of(secret)


def _parse_limits(words: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name == "admin" and text in ("0", "1"):
            value: Any = text == "1"
        elif name in _LIMITS and re.fullmatch(r"-?\d{1,13}", text):
            low, high = _LIMITS[name]
            if not low <= (value := int(text)) <= high:
                raise Malformed(f"{name} must be from {low} to {high}")
        else:
            raise Malformed(f"after the key come {', '.join(f'{one}=N' for one in _LIMITS)} and admin=1, nothing else")
        if name in found:
            raise Malformed(f"{name} is there twice")
        found[name] = value
    return found


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True)
class _State:
    """What of a file changes when it is written or replaced."""

    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, found: os.stat_result) -> _State:
        return cls(found.st_ino, found.st_size, found.st_ctime_ns)


# ---- whoever asks


class Keys:
    """`path` is of the file; empty: nobody is asked for a key, and all are one caller without limits."""

    def __init__(self, path: str, clock: Clock, log: Any) -> None:
        """Raises ConfigError if the file cannot be read or is malformed."""
        self._path = path
        self._clock = clock
        self._log = log
        self._anyone = Caller(Key("", b"", admin=True, priority=None), clock)
        self._callers: dict[str, Caller] = {}
        self._state: _State | None = None
        if path:
            with _needed(path):
                self._read()

    @property
    def wanted(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._path)

    def caller(self, secret: str | None) -> Caller:
        """Whose key that is. Raises InvalidKey."""
        if not self._path:
            return self._anyone
        if secret is None:
            raise InvalidKey("no API key was sent: send one as `Authorization: Bearer KEY`")
        shown, found = digest_of(secret), None
        for caller in self._callers.values():  # all of them, so that the time tells nothing of which one is near
            if hmac.compare_digest(shown, caller.key.digest):
                found = caller
        if found is None:
            raise InvalidKey("the API key is not known here: check it, or ask whoever runs this server for one")
        return found

    async def follow(self) -> None:
        """Read the file again whenever it has changed. One that is malformed changes nothing, and the log says so."""
        said = ""
        while self._path:
            await self._clock.sleep(LOOK_SECONDS)
            try:
                if await asyncio.to_thread(self._read_if_changed):
                    said = ""
            except (OSError, ValueError, Malformed) as error:
                # What is malformed is met once a change, what cannot be read at every look.
                if (why := _why(error)) != said or not isinstance(error, OSError):
                    self._log.error("API keys stay as they are: their file cannot be used", path=self._path, why=why)
                said = why

    def _read_if_changed(self) -> bool:
        """Whether it was."""
        try:
            state = _State.of(os.stat(self._path))
        except FileNotFoundError:
            self._state = None
            raise
        if state == self._state:
            return False
        self._read()
        self._log.info("API keys were read again", keys=len(self._callers))
        return True

    def _read(self) -> None:
        """What is in flight under a name goes on counting; a key that is gone is refused from now on."""
        found, data = read_small(self._path, MOST_BYTES)
        self._state = _State.of(found)  # what cannot be opened or read now is tried again
        keys = keys_in(data)
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            self._log.warning("others can read the file of the API keys: chmod 600 it", path=self._path)
        callers = {}
        for key in keys:
            callers[key.name] = caller = self._callers.get(key.name) or Caller(key, self._clock)
            caller.key = key
        self._callers = callers


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    return "it is not UTF-8" if isinstance(error, ValueError) else str(error)


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key of an HTTP request; None: there is none."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, secret = value.decode("latin-1").strip().partition(" ")
            return secret.strip() if scheme.lower() == "bearer" and secret.strip() else None
    return None

"""Every setting: an environment variable with the prefix MOECULE_, typed, documented and validated here alone."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from common.errors import ConfigError

PREFIX = "MOECULE_"
ID_PATTERN = "^[A-Za-z0-9_-]{1,64}$"  # of an actor's id, which is a part of its subjects


def setting(default: Any, doc: str, *, low: float | None = None, high: float | None = None, unit: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high, "unit": unit})


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("models/tiny", "checkpoint folder as Hugging Face lays it out")
    model_name: str = setting("", "what clients call the model; empty: the folder's name")
    max_context: int = setting(0, "longest prompt plus output; 0: the model's own limit", low=0, unit="tokens")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where the model runs; so far always the CPU")
    host: str = setting("127.0.0.1", "address the gateway listens on")
    port: int = setting(8000, "port the gateway listens on", low=1, high=65535)
    nats_url: str = setting("nats://127.0.0.1:4222", "the NATS server")
    id: str = setting("", "this actor's id (letters, digits, - and _); empty: made from its place in the Procfile")
    link: Literal["auto", "mailbox", "bus"] = setting("auto", "how rows reach the shards; auto: mailbox inside a node")
    expert_copies: int = setting(1, "shards that hold each expert, as far as there are shards", low=1, high=16)
    kv_pages: int = setting(0, "KV pages of 64 tokens; 0: a sixteenth of the memory, at most 4096", low=0, unit="pages")
    max_batch: int = setting(64, "requests that run at a time on a worker", low=1, high=1024)
    chunk_tokens: int = setting(256, "prompt tokens computed in one step", low=1, high=65536, unit="tokens")
    queue_limit: int = setting(256, "requests a worker holds beside the running ones", low=0)
    prefix_cache: bool = setting(True, "reuse the KV pages of equal prefixes")
    pin: bool = setting(False, "bind each worker and shard to processor cores of its own")
    threads: int = setting(1, "intra-op threads of a worker or shard on CPU", low=1, high=256)
    body_limit: int = setting(4 << 20, "largest HTTP body", low=1024, unit="bytes")
    drain_seconds: float = setting(4.0, "how long a leaving actor finishes what is in flight", low=0, unit="s")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe log line shown")
    log_json: bool = setting(False, "log lines as JSON objects")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Raises ConfigError naming the variable, what it holds and what it may hold."""
        environ = os.environ if environ is None else environ
        hints = get_type_hints(cls)
        values = {}
        for field in dataclasses.fields(cls):
            text = environ.get(PREFIX + field.name.upper())
            if text is not None and text.strip() != "":
                values[field.name] = _parse(field, hints[field.name], text.strip())
        settings = cls(**values)
        if settings.id and not re.fullmatch(ID_PATTERN, settings.id):
            raise ConfigError(f"{PREFIX}ID is {settings.id!r}: use 1 to 64 letters, digits, - and _")
        return settings

    @property
    def served_name(self) -> str:
        return self.model_name or Path(self.model).resolve().name


def unknown_settings(environ: Mapping[str, str] | None = None) -> list[str]:
    """One sentence for each MOECULE_ variable that is no setting."""
    known = {field.name.upper() for field in dataclasses.fields(Settings)}
    sentences = []
    for name in os.environ if environ is None else environ:
        if name.startswith(PREFIX) and (rest := name.removeprefix(PREFIX)) not in known:
            near = difflib.get_close_matches(rest, known, n=1)
            sentences.append(f"{name} is no setting" + (f"; did you mean {PREFIX}{near[0]}?" if near else ""))
    return sentences


def _parse(field: dataclasses.Field[Any], kind: Any, text: str) -> Any:
    name, meta = PREFIX + field.name.upper(), field.metadata
    if get_origin(kind) is Literal:
        if text.lower() not in get_args(kind):
            raise ConfigError(f"{name} is {text!r}: use one of {', '.join(get_args(kind))}")
        return text.lower()
    if kind is bool:
        if text.lower() not in {"0", "1", "true", "false", "yes", "no", "on", "off"}:
            raise ConfigError(f"{name} is {text!r}: use 1 or 0")
        return text.lower() in {"1", "true", "yes", "on"}
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        word = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name} is {text!r}: use {word}") from None
    low, high = meta["low"], meta["high"]
    if not ((low is None or value >= low) and (high is None or value <= high)):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name} is {text}: use {bounds}{' ' + meta['unit'] if meta['unit'] else ''}")
    return value


def node_id() -> str:
    """Which machine this is: two actors with the same one can share memory and Unix sockets."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        boot, namespace = socket.gethostname(), sys.platform
    return hashlib.blake2b(f"{boot} {namespace}".encode(), digest_size=4).hexdigest()


def actor_id(kind: str, settings: Settings, environ: Mapping[str, str] | None = None) -> str:
    """MOECULE_ID, or kind, place in the Procfile (honcho's process name) and node: stable over restarts."""
    if settings.id:
        return settings.id
    return f"{kind}-{place_in_procfile(environ) or os.getpid()}-{node_id()}"


def place_in_procfile(environ: Mapping[str, str] | None = None) -> int:
    """2 for the process that honcho calls `expert_shard.2`; 0 for one that honcho did not start."""
    place = (os.environ if environ is None else environ).get("HONCHO_PROCESS_NAME", "").rpartition(".")[2]
    return int(place) if place.isdecimal() else 0
